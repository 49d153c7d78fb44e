"""Whether an engine can hold what is to be measured: asked once, before the first measurement. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from phloem.shared.engine.admission import HEADROOM_TOKENS
from phloem.shared.engine.offline.work import DecodePlan, OfflineWork
from phloem.shared.errors import ConfigError

_LEAST_CHUNK_PER_REQUEST = 8  # with less, the first requests are far ahead when the last one starts


class Room(NamedTuple):
    """What a started engine has. `context_length`: by flag or model, whatever the pool holds;
    `model_context`: what the flag can be raised to; `chunk_tokens`: most tokens of a step."""

    max_running_requests: int
    context_length: int
    model_context: int
    page_size: int
    num_pages: int
    chunk_tokens: int

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)


class Shape(NamedTuple):
    """One prompt length or batch, as its flag says it."""

    name: str
    value: str

    def refused(self, why: str) -> ConfigError:
        return ConfigError(f"--{self.name} {self.value}: {why}", param=self.name)


def check_fits(work: OfflineWork, room: Room) -> None:
    """Raises `ConfigError` for the first prompt or batch that can't be measured, with the flag to change."""
    for length in work.prefill:
        _check_prompt(length, room)
    for batch, context in work.decode:
        plan = DecodePlan(batch, context, work.steps, room.chunk_tokens)
        _check_slots(plan, room)
        _check_chunk(plan)
        _check_batch(plan, room)


def _check_prompt(length: int, room: Room) -> None:
    shape = Shape("prefill", str(length))
    _check_context(shape, length + 1, room, f"it to {room.context_length - 1}")
    _check_pool(shape, room.pages_for(length + 1), room)


def _check_slots(plan: DecodePlan, room: Room) -> None:
    if plan.batch > room.max_running_requests:
        raise _shape(plan).refused(
            f"the engine runs {room.max_running_requests} requests at once: raise --max-running-requests "
            f"to {plan.batch}, or lower the batch"
        )


def _check_chunk(plan: DecodePlan) -> None:
    least = _LEAST_CHUNK_PER_REQUEST * plan.batch
    if plan.chunk_tokens < least:
        raise _shape(plan).refused(
            f"with --chunked-prefill-size {plan.chunk_tokens} its first requests would be far ahead when "
            f"the last one starts: raise it to {least}, or lower the batch"
        )


def _check_batch(plan: DecodePlan, room: Room) -> None:
    shape = _shape(plan)
    _check_context(shape, plan.longest, room, _lower(plan, room.context_length))
    _check_pool(shape, _batch_pages(plan, room.pages_for), room)


def _check_context(shape: Shape, tokens: int, room: Room, lower: str) -> None:
    """`lower`: what fits, as the end of "lower ..."."""
    if tokens > room.context_length:
        grow = f"raise --context-length to {tokens}, or " if tokens <= room.model_context else ""
        raise shape.refused(
            f"a request grows to {tokens} tokens, over the context of {room.context_length}: "
            f"{grow}lower {lower}"
        )


def _lower(plan: DecodePlan, context_length: int) -> str:
    """Fewer tokens of context where that is enough, else fewer steps."""
    shorter = plan._replace(context=plan.context - (plan.longest - context_length))
    fits = shorter.context > 0 and shorter.longest <= context_length
    return f"it to {shorter.batch}x{shorter.context}" if fits else "--steps"


def _check_pool(shape: Shape, num_pages: int, room: Room) -> None:
    if num_pages > room.num_pages:
        needed, there = (pages * room.page_size for pages in (num_pages, room.num_pages))
        raise shape.refused(
            f"it needs KV pages for {needed} tokens, and the pool holds {there}: give "
            f"--max-total-tokens {needed}, or lower it"
        )


def _batch_pages(plan: DecodePlan, pages_for: Callable[[int], int]) -> int:
    """The most pages that the whole batch needs: when it ends, or, of a short run, when its last request is
    admitted, which asks for headroom and a page of growth for each that runs."""
    *earlier, last = plan.prompts
    at_end = sum(pages_for(prompt + plan.new_tokens) for prompt in plan.prompts)
    held = sum(pages_for(prompt + plan.lead) for prompt in earlier)
    asked = pages_for(last + min(plan.new_tokens, HEADROOM_TOKENS)) + len(earlier)
    return max(at_end, held + asked)


def _shape(plan: DecodePlan) -> Shape:
    return Shape("decode", f"{plan.batch}x{plan.context}")
