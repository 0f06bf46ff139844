"""Triton kernels, one file per op; installed as `dive_fast.kernels`."""
