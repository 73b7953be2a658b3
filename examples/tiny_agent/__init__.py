"""The tiny agent: a Qwen3.5-MoE of about 2.6M parameters, trained on generated tool-calling conversations."""
