"""Any order of steps, messages, aborts, breaks and time-outs ends with both sides settled."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from phloem.shared.engine.kv_pool import OwnerKey
from phloem.shared.transfer.pending import DONE
from phloem.shared.transfer.stats import SendRates
from tests.support.handover_wire import HeldBack, Wire
from tests.support.handover_world import TIMEOUT_S, HandoverWorld, Job

NUM_JOBS = 3
jobs = st.integers(0, NUM_JOBS - 1)


class Progress:
    """What a job's two engines have done with it so far."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.begun = False
        self.made = False
        self.reserved = False
        self.gone_at_prefill = False  # aborted there
        self.gone_at_decode = False


class HandoverMachine(RuleBasedStateMachine):
    @initialize(
        slot_bytes=st.sampled_from([8, 24, 32, 100]),
        num_slots=st.integers(1, 3),
        is_open=st.booleans(),
        holds_back=st.booleans(),
        lengths=st.lists(st.integers(1, 14), min_size=NUM_JOBS, max_size=NUM_JOBS),
    )
    def start(
        self, slot_bytes: int, num_slots: int, is_open: bool, holds_back: bool, lengths: list[int]
    ) -> None:
        self.world = HandoverWorld(Wire(slot_bytes=slot_bytes, num_slots=num_slots, is_open=is_open))
        self.world.decode_store.holds_back = holds_back
        self.marks: list[HeldBack] = []
        self.all = [Progress(self.world.job(f"r{i}", length)) for i, length in enumerate(lengths)]
        self.num_losses = 0

    # -- the engines -----------------------------------------------------------------------------------

    @rule(index=jobs)
    def begin(self, index: int) -> None:
        progress = self.all[index]
        if not progress.begun:
            progress.begun = True
            progress.job.begin()

    @rule(index=jobs, num_tokens=st.integers(0, 13))
    def compute(self, index: int, num_tokens: int) -> None:
        progress = self.all[index]
        if self._lives_at_prefill(progress) and not progress.made and num_tokens < progress.job.num_tokens:
            progress.job.compute(max(num_tokens, progress.job.sent.num_computed_tokens))

    @rule(index=jobs, num_tokens=st.integers(1, 14), layers=st.integers(1, 4))
    def launch(self, index: int, num_tokens: int, layers: int) -> None:
        """A step whose layers the device has not all written yet."""
        job = self.all[index].job
        end = min(num_tokens, job.num_tokens)
        if not self._lives_at_prefill(self.all[index]) or end <= job.sent.num_computed_tokens:
            return
        watch = job.launch(end, SendRates(1e3))
        if watch is not None:
            mark = HeldBack()
            self.marks.append(mark)
            for layer_end in watch.layer_ends:
                watch.reached(layer_end, DONE if layer_end < layers else mark)

    @rule()
    def prefill_device_finishes(self) -> None:
        for mark in self.marks:
            mark.is_done = True

    @rule(index=jobs, first_page=st.sampled_from([100, 200]))
    def retract(self, index: int, first_page: int) -> None:
        if self._lives_at_prefill(self.all[index]) and not self.all[index].made:
            self.prefill_device_finishes()  # pages come back only after the step
            self.all[index].job.retract(first_page + 10 * index)

    @rule()
    def decode_device_finishes(self) -> None:
        self.world.decode_store.finish()

    @rule()
    def poll(self) -> None:
        self.world.poll()

    @rule(index=jobs)
    def make_token(self, index: int) -> None:
        progress = self.all[index]
        if self._lives_at_prefill(progress) and not progress.made:
            self.prefill_device_finishes()
            progress.made = True
            progress.job.make_token(index)

    @rule(index=jobs, num_held_pages=st.integers(0, 4))
    def reserve(self, index: int, num_held_pages: int) -> None:
        progress = self.all[index]
        if not progress.reserved and not progress.gone_at_decode:
            progress.reserved = True
            progress.job.reserve(min(num_held_pages, progress.job.num_pages))

    @rule()
    def pump(self) -> None:
        self.world.pump()

    @rule(index=jobs)
    def abort_at_prefill(self, index: int) -> None:
        progress = self.all[index]
        if self._lives_at_prefill(progress):
            progress.gone_at_prefill = True
            progress.job.drop_sent()

    @rule(index=jobs)
    def abort_at_decode(self, index: int) -> None:
        progress = self.all[index]
        if progress.job.key not in self._ended_at_decode():
            progress.gone_at_decode = True
            progress.job.drop_received()

    # -- the channel -----------------------------------------------------------------------------------

    @rule()
    @precondition(lambda self: self.world.wire.to_prefill)
    def pass_to_prefill(self) -> None:
        self.world.wire.pass_to_prefill()

    @rule()
    @precondition(lambda self: self.world.wire.to_decode)
    def pass_to_decode(self) -> None:
        self.world.wire.pass_to_decode()

    @rule()
    @precondition(lambda self: self.world.wire.is_open and self.num_losses < 2)
    def lose(self) -> None:
        self.num_losses += 1
        self.world.wire.lose()

    @rule()
    @precondition(lambda self: not self.world.wire.is_open)
    def open(self) -> None:
        self.world.wire.open()

    @rule(seconds=st.sampled_from([0.1, TIMEOUT_S / 2, TIMEOUT_S + 1]))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    # -- the end ---------------------------------------------------------------------------------------

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        if not self.world.wire.is_open:
            self.world.wire.open()
        for index in range(NUM_JOBS):
            self.begin(index)
            self.make_token(index)
            self.reserve(index, 0)
        self.world.decode_store.holds_back = False
        self.world.decode_store.finish()
        self.world.poll()
        self.world.run()
        for _ in range(2):  # the news of a time-out travels too
            self.world.pass_time(TIMEOUT_S + 1)
            self.world.run()
        self._check_settled()
        for progress in self.all:
            self._check(progress)

    def _check_settled(self) -> None:
        world = self.world
        assert not world.sender.active and not world.receiver.active
        assert not world.wire.unreleased
        assert world.wire.num_free_slots == world.wire.num_slots

    def _check(self, progress: Progress) -> None:
        """Each side knows of exactly one end, and what was admitted is right and whole."""
        job, world = progress.job, self.world
        assert (job.key in world.sent) != progress.gone_at_prefill
        assert (job.key in self._ended_at_decode()) != progress.gone_at_decode
        if job.key in world.admitted:
            assert job.kv_arrived
            assert world.admitted[job.key] == [self.all.index(progress)]
            assert world.sent[job.key] is None
        timed_out = job.key in world.failed and world.failed[job.key].code == "handover_timeout"
        undisturbed = not (
            progress.gone_at_prefill or progress.gone_at_decode or self.num_losses or timed_out
        )
        if undisturbed and world.sent[job.key] is None:
            assert job.key in world.admitted

    def _lives_at_prefill(self, progress: Progress) -> bool:
        gone = progress.gone_at_prefill or progress.job.key in self.world.sent
        return progress.begun and not gone

    def _ended_at_decode(self) -> set[OwnerKey]:
        return self.world.failed.keys() | self.world.admitted.keys()


HandoverMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestHandoverInterleavings = HandoverMachine.TestCase
