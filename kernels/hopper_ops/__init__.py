"""CUDA C++ for Hopper, compiled at start by NVRTC."""
