"""What fits into a device's memory, and what to say when something does not: pure, in bytes.

    device   [ others | weights | KV pages | graphs, workspaces, the largest step's activations | free ]
                      `--- static: --mem-fraction-static of the device ---'

The pool takes what the static share leaves beside the weights, and never more than what is left once graphs
and a largest step are there, which is measured (`rehearsal.py`), not guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from phloem.shared.engine.step_memory import (
    StepCost,
    StepSizes,
    as_flags,
    lowered,
    smaller_step,
    smallest_step,
)
from phloem.shared.errors import PhloemError

MARGIN_BYTES = 512 * 2**20  # fragmentation, and what another process may take meanwhile
USEFUL_TOKENS = 8192  # a suggestion should hold at least one long request
_LEAST_PAGES = 2


class DeviceMemory(NamedTuple):
    """`free` is what nobody holds, `own` what this process holds."""

    name: str
    total: int
    free: int
    own: int


class PoolWish(NamedTuple):
    """What the operator asked of the pool; `max_total_tokens` 0 leaves the size to `fraction`."""

    page_bytes: int
    page_size: int
    context_length: int
    fraction: float
    max_total_tokens: int


class PoolPlan(NamedTuple):
    """Pages for requests (one more is allocated as scratch), and what the operator should know."""

    num_pages: int
    note: str | None = None


class BesidePool(NamedTuple):
    """What stands beside the pool. `measured`: graphs, workspaces and the largest step, which is of `sizes`;
    `channels` is what KV transfer takes, `one_channel` what it would with `--transfer-peers 1`."""

    measured: int
    channels: int
    one_channel: int
    sizes: StepSizes
    cost: StepCost

    @property
    def total(self) -> int:
        return self.measured + self.channels

    def with_step(self, sizes: StepSizes) -> int:
        """About what `measured` would be with steps of other sizes: their part of it shrinks with them."""
        whole = self.cost.of(self.sizes)
        step = min(self.measured, whole)
        return self.measured - step + step * self.cost.of(sizes) // whole


def gb(num_bytes: float) -> str:
    """Bytes for people: "15.1 GB", "2.1 MB"."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 5e7 else f"{max(0.0, num_bytes) / 1e6:.1f} MB"


def out_of_memory(message: str, param: str) -> PhloemError:
    """Something does not fit; `param` is the flag that helps most."""
    return PhloemError("out_of_memory", message, param=param)


def stop_others(memory: DeviceMemory) -> str:
    """The advice where no smaller number helps."""
    others = max(0, memory.total - memory.free - memory.own)
    return f"stop what else uses the device ({gb(others)}), or use one with more memory"


# -- weights ------------------------------------------------------------------------------------------------


def check_weights(need: int, dtype: str, memory: DeviceMemory) -> None:
    """Raises `out_of_memory` when weights of `need` bytes can't be loaded."""
    if need > memory.free:
        raise weights_too_large(need, dtype, memory)


def weights_too_large(need: int, dtype: str, memory: DeviceMemory) -> PhloemError:
    """What to say when weights of `need` bytes were too much for what was free."""
    what = f"the weights need {gb(need)} in {dtype}"
    smaller = f", --dtype bfloat16 ({gb(need / 2)})" if dtype == "float32" else ""
    if need > memory.total:
        return out_of_memory(
            f"{what}, but {memory.name} has {gb(memory.total)} in all: use a device with more memory"
            f"{smaller} or a smaller model",
            "model_path",
        )
    others = memory.total - memory.free - memory.own
    return out_of_memory(
        f"{what}, but of {memory.name}'s {gb(memory.total)} only {gb(memory.free)} are free "
        f"(other processes hold {gb(others)}): stop them, or use another device{smaller} or a smaller "
        "model",
        "device",
    )


# -- KV pages -----------------------------------------------------------------------------------------------


def plan_pool(wish: PoolWish, memory: DeviceMemory, beside: BesidePool) -> PoolPlan:
    """Pages of the pool on a CUDA device. `memory` is with the weights loaded, and nothing else.

    Raises `out_of_memory` that names the number to change and what would fit.
    """
    room = memory.free - beside.total - MARGIN_BYTES
    most = _pages(room, wish)
    if most < _LEAST_PAGES:
        raise _no_room_for_pages(wish, memory, beside)
    if wish.max_total_tokens:
        return PoolPlan(_asked_for(wish, memory, most))
    static = memory.total * wish.fraction - memory.own
    if (pages := _pages(static, wish)) < _LEAST_PAGES:
        raise _fraction_too_low(wish, memory, room)
    if pages <= most:
        return PoolPlan(pages)
    note = (
        f"--mem-fraction-static {wish.fraction:g} would give KV pages {gb(static)}, but CUDA graphs, "
        f"the largest step and staging need {gb(beside.total)}: the pool takes {gb(room)}"
    )
    return PoolPlan(most, note)


def pool_not_allocated(
    num_pages: int, page_bytes: int, page_size: int, memory: DeviceMemory, beside: int = 0
) -> PhloemError:
    """What to say when a pool that should have fitted did not. `memory` is as it was before, `beside` what
    else is to come."""
    pages = int((memory.free - beside - MARGIN_BYTES) // page_bytes) - 1
    smaller = ""
    if pages >= _LEAST_PAGES:
        smaller = f"lower --mem-fraction-static, or give --max-total-tokens {pages * page_size}, or "
    return out_of_memory(
        f"KV pages for {num_pages * page_size} tokens, {gb((num_pages + 1) * page_bytes)}, could not be "
        f"allocated: {gb(memory.free)} of {memory.name}'s {gb(memory.total)} were free; {smaller}stop what "
        "else uses the device",
        "mem_fraction_static",
    )


def staging_not_allocated(need: int, memory: DeviceMemory) -> PhloemError:
    """What to say when staging for KV transfer, which has room beside the pool, got none."""
    return out_of_memory(
        f"{gb(need)} of staging memory for KV transfer could not be allocated: {gb(memory.free)} of "
        f"{memory.name}'s {gb(memory.total)} were free; lower --transfer-peers or --staging-bytes, or stop "
        "what else uses the device",
        "transfer_peers",
    )


def _pages(num_bytes: float, wish: PoolWish) -> int:
    """Pages for requests in so many bytes, with the scratch page beside them."""
    return int(num_bytes // wish.page_bytes) - 1


def _no_room_for_pages(wish: PoolWish, memory: DeviceMemory, beside: BesidePool) -> PhloemError:
    what = (
        f"the weights fit, but of the {gb(memory.free)} free beside them on {memory.name} CUDA graphs, the "
        f"largest step and staging take {gb(beside.total + MARGIN_BYTES)}, which leaves nothing for KV pages"
    )
    sizes, cost = beside.sizes, beside.cost

    def room(sizes: StepSizes, channels: int) -> int:
        return memory.free - beside.with_step(sizes) - channels - MARGIN_BYTES

    def step_beside(pool_bytes: int, channels: int) -> StepSizes | None:
        return smaller_step(sizes, cost, lambda sizes: room(sizes, channels) >= pool_bytes)

    for tokens in _worthwhile(wish):
        pool = (-(-tokens // wish.page_size) + 1) * wish.page_bytes
        for channels in (beside.channels, beside.one_channel):
            if (found := step_beside(pool, channels)) is not None:
                smaller = lowered(sizes, found, to_one_peer=channels < beside.channels)
                holds = _pages(room(found, channels), wish) * wish.page_size
                return out_of_memory(
                    f"{what}: lower {smaller}, which leaves room for about {holds} "
                    "tokens, or use a device with more memory",
                    "chunked_prefill_size",
                )
    least = smallest_step(sizes)
    need = memory.free - room(least, beside.one_channel) + (_LEAST_PAGES + 1) * wish.page_bytes
    return out_of_memory(
        f"{what}, and even {as_flags(least)} would need {gb(need)}: {stop_others(memory)}",
        "device",
    )


def _worthwhile(wish: PoolWish) -> Iterator[int]:
    """Tokens that a pool should hold: a long request, or, where that can't be had, the least that runs."""
    yield min(wish.context_length, wish.max_total_tokens or USEFUL_TOKENS)
    yield _LEAST_PAGES * wish.page_size


def _asked_for(wish: PoolWish, memory: DeviceMemory, most: int) -> int:
    pages = wish.max_total_tokens // wish.page_size
    if pages < _LEAST_PAGES:
        raise out_of_memory(
            f"--max-total-tokens {wish.max_total_tokens} is less than {_LEAST_PAGES} pages: give at least "
            f"{_LEAST_PAGES * wish.page_size}",
            "max_total_tokens",
        )
    if pages > most:
        raise out_of_memory(
            f"--max-total-tokens {wish.max_total_tokens} needs {gb((pages + 1) * wish.page_bytes)} of KV "
            f"pages, but weights, CUDA graphs and the largest step leave {gb(most * wish.page_bytes)} of "
            f"{memory.name}: lower it to {most * wish.page_size}",
            "max_total_tokens",
        )
    return pages


def _fraction_too_low(wish: PoolWish, memory: DeviceMemory, room: int) -> PhloemError:
    static = memory.total * wish.fraction
    return out_of_memory(
        f"--mem-fraction-static {wish.fraction:g} allows weights and KV pages {gb(static)} of "
        f"{memory.name}'s {gb(memory.total)}; the weights alone take {gb(memory.own)}, and a page "
        f"of {wish.page_size} tokens {gb(wish.page_bytes)}: {_more_room(wish, memory, room)}, or use a "
        "smaller model",
        "mem_fraction_static",
    )


def _more_room(wish: PoolWish, memory: DeviceMemory, room: int) -> str:
    """A share, rounded up to a percent, that holds a long request; where that would be everything, a size."""
    tokens = min(wish.context_length, USEFUL_TOKENS)
    useful = (-(-tokens // wish.page_size) + 1) * wish.page_bytes
    fraction = -(-100 * (memory.own + min(useful, room)) // memory.total) / 100
    if fraction >= 1:
        return f"give --max-total-tokens {_pages(room, wish) * wish.page_size}"
    holds = _pages(memory.total * fraction - memory.own, wish) * wish.page_size
    return f"raise it to {fraction:.2f}, which holds {holds} tokens"
