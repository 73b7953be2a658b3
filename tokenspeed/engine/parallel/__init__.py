"""SPMD: where tensors live on a group of ranks."""
