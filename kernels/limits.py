"""What kernels take, for who chooses among them before torch is there."""

DECODE_HEAD_DIMS = (64, 128, 256)  # of those that decode steps are made of
