"""How many kernels Triton compiles for sampling over all batch sizes: nobody waits for a compiler later."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import sys
from collections import defaultdict

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from phloem.kernels.triton_ops import sampling

backend = make_backend(GPUTarget("cuda", 90, 32))
variants = defaultdict(set)


def run(self, *args, grid, warmup, **kwargs):
    bind = create_function_from_signature(self.signature, self.params, backend)
    variants[self.fn.__name__].add(str(bind(*args, **kwargs)[1]))


JITFunction.run = run
most = torch.zeros(300, dtype=torch.int64)
header = torch.zeros(2, dtype=torch.int32)[1:]
all_logits = torch.empty(300, 128_256)


def rows_of(count, dtype):
    return most.view(dtype)[:count]  # where a batch's values begin is a multiple of 16 bytes


for count in range(1, 300):
    floats, ints = rows_of(count, torch.float32), rows_of(count, torch.int64)
    logits = all_logits[:count]
    sampling.sample(logits, floats, ints, floats, floats, ints, ints, all_greedy=False, no_filters=False)
    for all_greedy in (False, True):  # without filters this is what all steps take
        sampling.sample_to_slots(logits, floats, ints, ints, ints, most, most, header, all_greedy=all_greedy)
for name, found in sorted(variants.items()):
    print(name, len(found))
"""

EXPECTED = {
    "_choose_kernel": 3,  # for rows in order, and for slots of drawn and of greedy rows
    "_largest_of_block_kernel": 1,
    "_noisy_best_of_block_kernel": 2,  # with thresholds, and without
    "_round_kernel": 8,  # four rounds of top_k, and of top_p
    "_threshold_kernel": 1,
}


def test_sampling_has_the_same_kernels_for_all_batches() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines())
    assert {name: int(count) for name, count in found.items()} == EXPECTED
