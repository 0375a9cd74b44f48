"""Triton kernels. Nothing here imports Triton until a kernel module is imported by name."""
