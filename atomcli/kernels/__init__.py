"""CUDA kernels and their plain-torch oracle."""
