"""A prefill and a decode engine without a model, joined by a wire in memory."""

from __future__ import annotations

from typing import NamedTuple

from tests.support.engine_world import EngineWorld, next_tokens
from tests.support.handover_wire import D, P, Wire
from tests.support.streams import Stream

PAGE = 4


class Sides(NamedTuple):
    """What both workers say about one request."""

    prefill: Stream
    decode: Stream

    @property
    def handed_over(self) -> bool:
        return (self.prefill.ended, self.decode.ended) == ("handed_over", "finished")

    @property
    def codes(self) -> list[str | None]:
        return [None if stream.error is None else stream.error.code for stream in self]


class Pair:
    """A prefill and a decode engine; both devices run ahead."""

    def __init__(
        self,
        wire: Wire | None = None,
        *,
        prefill_pages: int = 64,
        decode_pages: int = 64,
        decode_slots: int = 8,
        runs_ahead: bool = True,
    ) -> None:
        self.wire = wire or Wire(slot_bytes=2 * 8 * PAGE, num_slots=2)
        self.prefill = EngineWorld(self.wire.prefill, num_pages=prefill_pages, runs_ahead=runs_ahead)
        self.decode = EngineWorld(
            self.wire.decode, num_pages=decode_pages, slots=decode_slots, runs_ahead=runs_ahead
        )
        self.wire.clock = lambda: self.prefill.now_s
        self.wire.deliver_to_prefill = self.prefill.engine.deliver
        self.wire.deliver_to_decode = self.decode.engine.deliver

    def submit(
        self, request_id: str, prompt: list[int], max_tokens: int = 8, stop: tuple[int, ...] = ()
    ) -> Sides:
        return Sides(
            self.submit_prefill(request_id, prompt, max_tokens, stop),
            self.submit_decode(request_id, prompt, max_tokens, stop),
        )

    def submit_prefill(
        self, request_id: str, prompt: list[int], max_tokens: int = 8, stop: tuple[int, ...] = ()
    ) -> Stream:
        return self.prefill.submit(request_id, prompt, max_tokens, phase="prefill", peer=D, stop=stop)

    def submit_decode(
        self, request_id: str, prompt: list[int], max_tokens: int = 8, stop: tuple[int, ...] = ()
    ) -> Stream:
        return self.decode.submit(request_id, prompt, max_tokens, phase="decode", peer=P, stop=stop)

    def step(self) -> None:
        """A turn of each engine; all messages under way arrive."""
        self.prefill.turn()
        self.decode.turn()
        self.wire.pass_all()

    def run(self) -> None:
        """Until neither engine has anything to do and no message is under way."""
        for _ in range(3000):
            busy = [self.prefill.turn(), self.decode.turn()]
            if not (any(busy) or self.wire.to_decode or self.wire.to_prefill):
                return
            self.wire.pass_all()
        raise AssertionError("the pair does not come to rest")

    def assert_idle(self) -> None:
        self.run()
        self.prefill.assert_idle()
        self.decode.assert_idle()
        assert not self.wire.unreleased and self.wire.num_free_slots == self.wire.num_slots


def assert_tokens(sides: Sides, prompt: list[int], count: int) -> None:
    assert sides.handed_over, sides
    assert sides.prefill.token_ids + sides.decode.token_ids == next_tokens(prompt, count)
