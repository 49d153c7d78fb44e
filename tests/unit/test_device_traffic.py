"""`DeviceTraffic`: who waits for whom before NCCL takes a channel apart."""

from __future__ import annotations

import threading
import time

from phloem.shared.transfer.traffic import DeviceTraffic

WAIT_S = 10.0
LONG_S = 60.0  # nothing that is waited for here ends by this bound
SHORT_S = 0.15


class Event:
    def __init__(self, *, fails: bool = False) -> None:
        self.done = threading.Event()
        self.num_looks = 0
        self._fails = fails

    def query(self) -> bool:
        self.num_looks += 1
        if self._fails:
            raise RuntimeError("CUDA's driver fails")
        return self.done.is_set()


def settling(traffic: DeviceTraffic, timeout_s: float = LONG_S) -> threading.Thread:
    """A thread that ends when `settle` does; everything that is posted by now counts."""
    thread = threading.Thread(target=traffic.settle, args=(timeout_s,), daemon=True)
    thread.start()
    return thread


def looked_at(event: Event) -> None:
    deadline = time.monotonic() + WAIT_S
    while not event.num_looks and time.monotonic() < deadline:
        time.sleep(0.001)
    assert event.num_looks


def has_ended(thread: threading.Thread, within_s: float = WAIT_S) -> bool:
    thread.join(within_s)
    return not thread.is_alive()


def test_operation_that_was_posted_is_waited_for() -> None:
    traffic = DeviceTraffic()
    traffic.enter().newest = event = Event()
    thread = settling(traffic)
    assert not has_ended(thread, SHORT_S)
    event.done.set()
    assert has_ended(thread)


def test_operation_of_a_channel_that_leaves_is_waited_for_no_longer() -> None:
    traffic = DeviceTraffic()
    lane = traffic.enter()
    lane.newest = Event()
    thread = settling(traffic)
    assert not has_ended(thread, SHORT_S)
    traffic.leave(lane)
    assert has_ended(thread)
    traffic.leave(lane)  # its abort may be asked for twice


def test_channel_that_never_rests_holds_nobody_up() -> None:
    """What it posts after the first look does not count."""
    traffic = DeviceTraffic()
    lane = traffic.enter()
    lane.newest = first = Event()
    thread = settling(traffic)
    looked_at(first)
    lane.newest = Event()
    first.done.set()
    assert has_ended(thread)


def test_two_that_are_given_up_together_do_not_wait_for_each_other() -> None:
    traffic = DeviceTraffic()
    lanes = [traffic.enter() for _ in range(2)]
    for lane in lanes:
        lane.newest = Event()

    def give_up(index: int) -> None:
        traffic.leave(lanes[index])
        traffic.settle(LONG_S)

    threads = [threading.Thread(target=give_up, args=(index,), daemon=True) for index in range(2)]
    threads[0].start()
    assert not has_ended(threads[0], SHORT_S)
    threads[1].start()
    assert all(has_ended(thread) for thread in threads)


def test_wait_has_a_bound() -> None:
    traffic = DeviceTraffic()
    traffic.enter().newest = Event()
    began_s = time.monotonic()
    traffic.settle(SHORT_S)
    assert SHORT_S <= time.monotonic() - began_s < LONG_S


def test_nothing_runs_on_a_device_that_has_failed_or_was_given_nothing() -> None:
    traffic = DeviceTraffic()
    traffic.enter().newest = Event(fails=True)
    traffic.enter()
    assert has_ended(settling(traffic))
