"""Weights in 8 bits, and the kernels that multiply by them."""
