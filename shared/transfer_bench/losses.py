"""Peers that die or freeze in the middle of a transfer, again and again, and what that does to the survivor.

One engine survives all of it. Each loss takes a victim, a peer whose few small staging slots make transfers
last; others have been started ahead. The next request goes to a peer with ordinary slots that holds a channel
all the time, as a cluster's other workers do; it is short, so that its time is the survivor's and not that of
a long prefill beside engines that start. Then the lost prompt is asked again, for its tokens. A loss counts
as *in mid-transfer* when some but not all KV of a hand-over had crossed: only those are counted, what came
too early or too late is repeated.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from phloem.shared.errors import PhloemError
from phloem.shared.protocol.cluster import Role
from phloem.shared.protocol.session import SamplingParams
from phloem.shared.transfer_bench.engine_client import EngineClient
from phloem.shared.transfer_bench.lab import HandOver, Lab, hand_over, prove_channel, whole

_GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
_MAX_TRIES_PER_LOSS = 4
_NEXT_TOKENS = 512  # of the request after a loss
_POLL_S = 0.001
# Codes by which a hand-over may end when its peer is lost: all retryable, the gateway submits anew.
LOSS_CODES = ("channel_lost", "peer_gone", "transfer_timeout", "handover_cancelled")


class LossPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What is done to whom. `staging` are (bytes, slots) of the victims in turn: small ones make a transfer
    last. `noticed_within_s`: the survivor must give the lost request up in this time."""

    count: int
    survivor: Role = "decode"
    how: signal.Signals = signal.SIGKILL
    prompt_tokens: int
    vocabulary: int
    survivor_gpu: int | None = None
    peer_gpu: int | None = None
    staging: tuple[tuple[int, int], ...]
    noticed_within_s: float
    num_spares: int = 3  # victims that start while others are lost
    seed: int = 0


class Loss(msgspec.Struct, frozen=True):
    """One loss in mid-transfer. Seconds count from the signal; bytes are of the broken hand-over."""

    bytes_crossed: int
    bytes_in_all: int
    error_code: str
    noticed_s: float
    next_request_s: float
    memory_mib: float


@dataclass
class LossRun:
    """Carries a plan out. `memory_mib` reads the survivor's memory; called when nothing moves."""

    lab: Lab
    plan: LossPlan
    memory_mib: Callable[[EngineClient], float]
    tell: Callable[[str], None]
    losses: list[Loss] = field(default_factory=list)
    num_tries: int = 0

    async def run(self) -> list[Loss]:
        """Raises `PhloemError` when a bound is not kept, a token is wrong, or an audit is not clean."""
        plan = self.plan
        self._rng = random.Random(plan.seed)
        self._num_victims = 0
        self._victims: list[asyncio.Task[EngineClient]] = []
        peers = {"transfer_peers": plan.num_spares + 3}  # the steady one, the victim, and one just lost
        survivor = self.lab.start(plan.survivor, plan.survivor_gpu, name="survivor", changes=peers)
        self._starting = asyncio.create_task(survivor)
        steady = asyncio.create_task(self._start_peer({}))
        try:
            self._top_up(plan.count)
            self._survivor = await self._starting
            other = await steady
            while len(self.losses) < plan.count:
                self.num_tries += 1
                if self.num_tries > _MAX_TRIES_PER_LOSS * plan.count:
                    raise PhloemError("bench_failed", "transfers end before they can be interrupted")
                victim = await self._next_victim(plan.count - len(self.losses) - 1)
                await self._lose(victim, other)
        finally:
            tasks = (self._starting, steady, *self._victims)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return self.losses

    # -- peers ---------------------------------------------------------------------------------------------

    def _top_up(self, wanted: int) -> None:
        while len(self._victims) < min(wanted, self.plan.num_spares):
            num_bytes, slots = self.plan.staging[self._num_victims % len(self.plan.staging)]
            self._num_victims += 1
            small = {"staging_bytes": num_bytes, "staging_slots": slots}
            self._victims.append(asyncio.create_task(self._start_peer(small)))

    async def _start_peer(self, staging: dict[str, int]) -> EngineClient:
        """A peer whose channel works; `staging` are options other than the lab's."""
        role: Role = "prefill" if self.plan.survivor == "decode" else "decode"
        changes = {**staging, "disable_cuda_graph": True}
        peer = await self.lab.start(role, self.plan.peer_gpu, changes=changes)
        self._survivor = await self._starting
        prefill, decode = self._sides(peer)
        await prefill.peer_up(decode)
        await prove_channel(prefill, decode, f"channel of {peer.ref.worker_id}")
        return peer

    async def _next_victim(self, wanted_after: int) -> EngineClient:
        if not self._victims:
            self._top_up(1)
        victim = await self._victims.pop(0)
        self._top_up(wanted_after)
        return victim

    def _sides(self, peer: EngineClient) -> tuple[EngineClient, EngineClient]:
        """Prefill, decode."""
        return (peer, self._survivor) if self.plan.survivor == "decode" else (self._survivor, peer)

    # -- one loss ------------------------------------------------------------------------------------------

    async def _lose(self, victim: EngineClient, other: EngineClient) -> None:
        """Interrupts a transfer; what the lost request would have said, the other peer's pair must say."""
        prompt, next_prompt = self._prompt(self.plan.prompt_tokens), self._prompt(_NEXT_TOKENS)
        name = f"loss-{self.num_tries}"
        expected = await whole(other, f"{name}-whole", prompt, _GREEDY)
        await other.flush()
        before = await self._bytes_moved()
        broken = await hand_over(*self._sides(victim), name, prompt, _GREEDY)
        await self._wait_for_middle(broken, before)
        struck_s = time.monotonic()
        victim.signal(self.plan.how)
        short = await hand_over(*self._sides(other), f"{name}-next", next_prompt, _GREEDY)
        await short.decode.until_tokens(1, 60.0)
        next_request_s = time.monotonic() - struck_s
        again = await hand_over(*self._sides(other), f"{name}-again", prompt, _GREEDY)
        ours = broken.decode if self.plan.survivor == "decode" else broken.prefill
        await ours.until_end(self.plan.noticed_within_s + 5.0)
        noticed_s = ours.ended_at_s - struck_s
        await short.completed()
        tokens = await again.completed()
        await self._survivor.peer_down(victim.ref)
        await self.lab.kill(victim)
        audit = await self._survivor.audit_idle()
        crossed = self._moved(audit.counters) - before
        total = self._bytes_of(len(prompt))
        others = total + self._bytes_of(len(next_prompt))
        await self._survivor.flush()
        if tokens != expected:
            raise PhloemError("not_equal", f"{name}: {tokens} after the loss, {expected} before")
        if ours.reason != "failed" or ours.error is None:
            self.tell(f"{name}: the transfer was over before the signal")
            return
        # `short` and `again` moved whole prompts: the survivor's tree was empty of both.
        self._judge(Loss(crossed - others, total, ours.error.code, noticed_s, next_request_s, 0.0), name)

    def _judge(self, loss: Loss, name: str) -> None:
        if loss.error_code not in LOSS_CODES:
            raise PhloemError("bench_failed", f"{name} ended with {loss.error_code}")
        if loss.noticed_s > self.plan.noticed_within_s:
            raise PhloemError("bench_failed", f"{name} was noticed after {loss.noticed_s:.1f} s")
        if not 0 < loss.bytes_crossed < loss.bytes_in_all:
            self.tell(
                f"{name}: {loss.bytes_crossed} of {loss.bytes_in_all} bytes had crossed: not the middle"
            )
            return
        loss = msgspec.structs.replace(loss, memory_mib=self.memory_mib(self._survivor))
        self.losses.append(loss)
        self.tell(
            f"{name}: {loss.bytes_crossed / loss.bytes_in_all:.0%} had crossed; {loss.error_code} after "
            f"{loss.noticed_s:.2f} s; next request served after {loss.next_request_s:.2f} s; "
            f"{loss.memory_mib:.0f} MiB"
        )

    async def _wait_for_middle(self, broken: HandOver, before: int) -> None:
        """Until some bytes have moved, and then for a random while; or until all is over. The engine is
        another process: it must be asked."""
        while broken.decode.reason is None:
            if await self._bytes_moved() != before:
                break
            await asyncio.sleep(_POLL_S)
        await asyncio.sleep(self._rng.random() * 0.01)

    async def _bytes_moved(self) -> int:
        return self._moved((await self._survivor.audit()).counters)

    def _moved(self, counters: dict[str, int]) -> int:
        return counters["bytes_received"] + counters["bytes_sent"]

    def _bytes_of(self, num_tokens: int) -> int:
        page_size = self._survivor.ready.page_size
        return -(-num_tokens // page_size) * page_size * self._survivor.ready.kv_bytes_per_token

    def _prompt(self, num_tokens: int) -> list[int]:
        return [self._rng.randrange(2, self.plan.vocabulary) for _ in range(num_tokens)]
