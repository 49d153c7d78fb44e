"""What kernels take, for who chooses among them before torch is there."""

DECODE_HEAD_DIMS = (64, 128, 256)  # of those that decode steps are made of
HOPPER = (9, 0)  # the compute capability that kernels in CUDA C++ are for, of models with SiLU
HOPPER_ACTIVATION = "silu"
