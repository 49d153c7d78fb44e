"""Triton kernels of what is ours; each agrees with its namesake in `kernels/reference/`."""
