"""FlashInfer behind our ops: paged attention (FA2, FA3), norms. Needs CUDA and flashinfer-python 0.6.14."""
