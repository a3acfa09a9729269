"""Triton kernels for CUDA devices. Nothing here imports triton before a backend is asked for."""
