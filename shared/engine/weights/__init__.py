"""Weights from files into a decoder: safetensors, dummy, and GGUF by conversion."""
