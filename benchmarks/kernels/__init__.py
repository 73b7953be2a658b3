"""One file per group of kernels; each offers `cases(sizes)`. benchmarks/cases.py finds the files by itself."""
