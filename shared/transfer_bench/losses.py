"""Peers that die or freeze in the middle of a transfer, again and again, and what that does to the survivor.

    survivor  ----- steady peer      ordinary staging slots; takes the next request, and the lost one again
              ----- victim           few and small slots: its transfer lasts long enough to have a middle
              ----- the next victim  joins while this one is lost, as workers do

One engine survives all of it. The next request starts with the signal; it is short, so that its time is the
survivor's and not that of a long prefill beside engines that start. Then the lost prompt is asked again, for
its tokens. A loss counts as *in mid-transfer* when some but not all KV of a hand-over had crossed: only those
are counted, what came too early or too late is repeated. Memory is read when the survivor holds just the
channels of the steady peer and of the next victim, so that readings can be compared.
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
from phloem.shared.transfer_bench.loss_peers import STARTS_BESIDE_LOSSES, PeerPlan, Peers

_GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
_MAX_TRIES_PER_LOSS = 4
_NEXT_TOKENS = 512  # of the request after a loss
_POLL_S = 0.001
_LATEST_BLOW_S = 0.2  # after the first bytes have crossed,
_LATEST_BLOW_SHARE = 0.5  # or once this share of them has
_CHANNELS_BETWEEN = 2  # the steady peer's and the next victim's
_SETTLE_TIMEOUT_S = 30.0  # NCCL's abort took up to 8 s on a busy host
# Codes by which a hand-over may end when its peer is lost: all retryable, the gateway submits anew.
LOSS_CODES = ("channel_lost", "peer_gone", "transfer_timeout", "handover_cancelled")


class LossPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What is done to whom: `kills` peers get a SIGKILL, then `freezes` a SIGSTOP. The survivor must give the
    lost request up within `killed_within_s` or `frozen_within_s`. Memory is read at every `memory_every`th
    loss."""

    kills: int
    freezes: int = 0
    survivor: Role = "decode"
    survivor_gpu: int | None = None
    peers: PeerPlan
    prompt_tokens: int
    vocabulary: int
    killed_within_s: float
    frozen_within_s: float
    memory_every: int = 1
    seed: int = 0

    @property
    def count(self) -> int:
        return self.kills + self.freezes

    def blow(self, number: int) -> tuple[signal.Signals, float]:
        """The signal of loss `number`, from 0, and within what time the survivor must notice."""
        if number < self.kills:
            return signal.SIGKILL, self.killed_within_s
        return signal.SIGSTOP, self.frozen_within_s


class Loss(msgspec.Struct, frozen=True):
    """One loss in mid-transfer. Seconds count from the signal; bytes are of the broken hand-over."""

    how: str
    bytes_crossed: int
    bytes_in_all: int
    error_code: str
    noticed_s: float
    next_request_s: float


@dataclass
class LossRun:
    """Carries a plan out: `prepare`, `run`, `close`. `memory_mib` reads the survivor's memory, on a thread,
    when nothing moves; what it read is in `memories_mib`."""

    lab: Lab
    plan: LossPlan
    memory_mib: Callable[[EngineClient], float]
    tell: Callable[[str], None]
    losses: list[Loss] = field(default_factory=list)
    memories_mib: list[float] = field(default_factory=list)
    num_tries: int = 0

    def __post_init__(self) -> None:
        self._rng = random.Random(self.plan.seed)
        self._peers = Peers(self.lab, self.plan.peers)
        self._next: asyncio.Task[EngineClient] | None = None
        self._settled_bytes = 0  # of staging, lent to two channels

    def start_ahead(self) -> None:
        """Starts processes of the first victims, for a later `run`; nothing else is going on."""
        num_victims = self.plan.count + 1
        self._peers.start_ahead(num_victims, num_victims)

    def start_beside(self, num_processes: int, num_starts: int) -> None:
        """Starts some of them while another run loses its own: up to so many processes, of which so many have
        to start at a time."""
        self._peers.start_ahead(min(num_processes, self.plan.count + 1), num_starts)

    async def prepare(self) -> None:
        """The survivor and its steady peer serve. Raises `PhloemError` when one does not start."""
        plan = self.plan
        # Staging for the steady peer, two victims, and those lost since memory was read, when NCCL has given
        # all of them up: on a busy host it takes longer for one than the next loss does.
        changes = {"transfer_peers": _CHANNELS_BETWEEN + plan.memory_every + 1}
        name = f"survivor-{plan.survivor}"
        self._survivor, self._steady = await asyncio.gather(
            self.lab.start(plan.survivor, plan.survivor_gpu, name=name, changes=changes),
            self._peers.start_ordinary(),
        )
        await self._join(self._steady)

    async def run(self, hand_on: Callable[[int, int], None] = lambda processes, starts: None) -> list[Loss]:
        """After `prepare`. Before each loss `hand_on` is told of how many processes ahead, and starts at a
        time, this run has no need any more: those of the next run come one by one in place of its own.

        Raises `PhloemError` when a bound is not kept, a token is wrong, or an audit is not clean.
        """
        count, num_ahead = self.plan.count, self.plan.peers.num_ahead
        victim = await self._next_victim(count + 1)
        self._settled_bytes = await self._until_channels_lend(None)
        while len(self.losses) < count:
            left = count - len(self.losses)
            hand_on(max(0, num_ahead - left), STARTS_BESIDE_LOSSES - self._peers.num_starting)
            self.num_tries += 1
            if self.num_tries > _MAX_TRIES_PER_LOSS * count:
                raise PhloemError("bench_failed", "transfers end before they can be interrupted")
            victim = await self._lose(victim, left)
            await self._read_memory()
        return self.losses

    async def close(self) -> None:
        """Gives up what is starting; engines that run are the lab's."""
        if self._next is not None:
            self._next.cancel()
            await asyncio.gather(self._next, return_exceptions=True)
        await self._peers.close()

    # -- peers ---------------------------------------------------------------------------------------------

    async def _next_victim(self, wanted_after: int) -> EngineClient:
        victim = await self._peers.take(wanted_after)
        await self._join(victim)
        return victim

    async def _join(self, peer: EngineClient) -> None:
        prefill, decode = self._sides(peer)
        await prefill.peer_up(decode)
        await prove_channel(prefill, decode, f"channel of {peer.ref.worker_id}")

    def _sides(self, peer: EngineClient) -> tuple[EngineClient, EngineClient]:
        """Prefill, decode."""
        return (peer, self._survivor) if self.plan.survivor == "decode" else (self._survivor, peer)

    # -- one loss ------------------------------------------------------------------------------------------

    async def _lose(self, victim: EngineClient, wanted_after: int) -> EngineClient:
        """Interrupts a transfer; what the steady peer says alone, it must say with the survivor too.
        Returns the next victim, which joins meanwhile: its channel may wait until NCCL has given up the lost
        one's, and the survivor is audited when both are through."""
        prompt, next_prompt = self._prompt(self.plan.prompt_tokens), self._prompt(_NEXT_TOKENS)
        how, within_s = self.plan.blow(len(self.losses))
        name = f"loss-{self.num_tries}"
        expected = await whole(self._steady, f"{name}-whole", prompt, _GREEDY)
        await self._steady.flush()
        total, before = self._bytes_of(len(prompt)), await self._bytes_moved()
        broken = await hand_over(*self._sides(victim), name, prompt, _GREEDY)
        crossed = await self._wait_for_middle(broken, before, total)
        struck_s = time.monotonic()
        victim.signal(how)
        short = await hand_over(*self._sides(self._steady), f"{name}-next", next_prompt, _GREEDY)
        await short.decode.until_tokens(1, 60.0)
        next_request_s = time.monotonic() - struck_s
        self._next = asyncio.create_task(self._next_victim(wanted_after))
        again = await hand_over(*self._sides(self._steady), f"{name}-again", prompt, _GREEDY)
        await short.completed()
        tokens = await again.completed()
        ours = broken.decode if self.plan.survivor == "decode" else broken.prefill
        await ours.until_end(within_s + 5.0)
        noticed_s = ours.ended_at_s - struck_s
        await self._survivor.peer_down(victim.ref)
        await self.lab.kill(victim)
        next_victim = await self._next
        await self._survivor.audit_idle()
        await asyncio.gather(self._survivor.flush(), self._steady.flush())
        if tokens != expected:
            raise PhloemError("not_equal", f"{name}: {tokens} after the loss, {expected} by one engine")
        if ours.reason != "failed" or ours.error is None:
            self.tell(f"{name}: the transfer was over before the signal")
        else:
            loss = Loss(how.name, crossed, total, ours.error.code, noticed_s, next_request_s)
            self._judge(loss, within_s, name)
        return next_victim

    def _judge(self, loss: Loss, within_s: float, name: str) -> None:
        if loss.error_code not in LOSS_CODES:
            raise PhloemError("bench_failed", f"{name} ended with {loss.error_code}")
        if loss.noticed_s > within_s:
            raise PhloemError("bench_failed", f"{name} was noticed after {loss.noticed_s:.1f} s")
        if not 0 < loss.bytes_crossed < loss.bytes_in_all:
            crossed = f"{loss.bytes_crossed} of {loss.bytes_in_all} bytes had crossed"
            self.tell(f"{name}: {crossed}: not the middle")
            return
        self.losses.append(loss)
        self.tell(
            f"{name}: {loss.how}, {loss.bytes_crossed / loss.bytes_in_all:.0%} had crossed; "
            f"{loss.error_code} after {loss.noticed_s:.2f} s; next request after {loss.next_request_s:.2f} s"
        )

    async def _wait_for_middle(self, broken: HandOver, before: int, total: int) -> int:
        """Until a random share of `total` bytes has crossed, or some have and a random while has passed, or
        all is over; returns how many have. The engine is another process: it must be asked."""
        share, while_s = self._rng.random() * _LATEST_BLOW_SHARE, self._rng.random() * _LATEST_BLOW_S
        first_s: float | None = None
        while True:
            crossed = await self._bytes_moved() - before
            now_s = time.monotonic()
            if crossed and first_s is None:
                first_s = now_s
            if broken.decode.reason is not None or (
                first_s is not None and (crossed >= share * total or now_s >= first_s + while_s)
            ):
                return crossed
            await asyncio.sleep(_POLL_S)

    async def _read_memory(self) -> None:
        if self.num_tries % self.plan.memory_every:
            return
        await self._until_settled()
        found = await asyncio.to_thread(self.memory_mib, self._survivor)
        self.memories_mib.append(found)
        self.tell(f"the survivor's memory: {found:.0f} MiB")

    async def _until_settled(self) -> None:
        """Until lost peers' channels are gone, and NCCL has let go of them: staging memory is lent until
        then. Raises `PhloemError` when one stays, or its memory does."""
        await self._until_channels_lend(self._settled_bytes)
        counters = (await self._survivor.audit()).counters
        if quarantined := counters["staging_quarantined_bytes"]:
            raise PhloemError("bench_failed", f"lost channels keep {quarantined} bytes of staging memory")

    async def _until_channels_lend(self, most_bytes: int | None) -> int:
        """Until as many channels are open as between two losses, with so much staging memory lent; the engine
        looks at them from time to time. Returns how much is."""
        deadline = time.monotonic() + _SETTLE_TIMEOUT_S
        while True:
            counters = (await self._survivor.audit()).counters
            channels, lent = counters["channels"], counters["staging_lent_bytes"]
            if channels == _CHANNELS_BETWEEN and (most_bytes is None or lent <= most_bytes):
                return lent
            if time.monotonic() > deadline:
                left = f"{channels} channels are open, {lent} bytes of staging lent, not {most_bytes}"
                raise PhloemError("bench_failed", f"after a loss {left}")
            await asyncio.sleep(10 * _POLL_S)

    async def _bytes_moved(self) -> int:
        counters = (await self._survivor.audit()).counters
        return counters["bytes_received"] + counters["bytes_sent"]

    def _bytes_of(self, num_tokens: int) -> int:
        page_size = self._survivor.ready.page_size
        return -(-num_tokens // page_size) * page_size * self._survivor.ready.kv_bytes_per_token

    def _prompt(self, num_tokens: int) -> list[int]:
        return [self._rng.randrange(2, self.plan.vocabulary) for _ in range(num_tokens)]
