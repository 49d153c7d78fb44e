"""Measures and attacks KV transfer between engine processes: the library of `phloem bench transfer` and of
`benchmarks/check_pair.py`.

`bandwidth` drives two ranks that hold paged KV and no model; the rest drives whole engine processes, as a
worker's front does, with random weights.
"""
