"""Pages that move beside a CUDA device's steps: bytes and digests as on the CPU, waited for by event."""

from __future__ import annotations

import pytest
import torch

from phloem.kernels import ops
from phloem.kernels.cuda_driver import cuda_driver
from phloem.shared.engine.cuda_page_store import CudaPageStore
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.transfer.device_event import ArrivalEvent, DeviceEvent
from phloem.shared.transfer.pending import Moved

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda:0")
NUM_LAYERS, NUM_PAGES = 4, 64


def make_kv(seed: int) -> KVCache:
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_PAGES, 16, 8, 128)
    planes = [torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(2 * NUM_LAYERS)]
    return KVCache(planes[::2], planes[1::2])


def on_cuda(kv: KVCache) -> KVCache:
    return KVCache([plane.to(CUDA) for plane in kv.k], [plane.to(CUDA) for plane in kv.v])


@pytest.mark.parametrize("num_pages", [1, 5, 16, 33])
@pytest.mark.parametrize("layers", [(0, 4), (1, 3), (3, 4)])
def test_pages_move_with_the_references_bytes_and_digest(num_pages: int, layers: tuple[int, int]) -> None:
    source, target = make_kv(0), make_kv(1)
    there, here = CudaPageStore(on_cuda(source), CUDA), CudaPageStore(on_cuda(target), CUDA)
    page_ids = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(2))[:num_pages]
    num_bytes = num_pages * (layers[1] - layers[0]) * there.layer_page_bytes
    expected = torch.zeros(num_bytes, dtype=torch.uint8)
    digest = ops.gather_pages(source, page_ids, *layers, expected)
    slot = torch.zeros(num_bytes + 64, dtype=torch.uint8, device=CUDA)

    gathered = there.gather(page_ids.tolist(), *layers, slot[:num_bytes])
    gathered.wait(5.0)
    assert gathered.done() and gathered.digest() == digest
    assert torch.equal(slot[:num_bytes].cpu(), expected) and not slot[num_bytes:].any()

    scattered = here.scatter(page_ids.flip(0).tolist(), *layers, slot[:num_bytes])
    scattered.wait(5.0)
    assert scattered.digest() == digest
    for layer in range(*layers):
        assert torch.equal(here._kv.k[layer][page_ids.flip(0)].cpu(), source.k[layer][page_ids])
        assert torch.equal(here._kv.v[layer][page_ids.flip(0)].cpu(), source.v[layer][page_ids])


def test_what_a_move_needs_is_used_again_when_nobody_holds_it() -> None:
    """More moves at a time than there are lanes, of more pages than lanes are made for: none gets another's
    digest or page ids."""
    kv = make_kv(0)
    store = CudaPageStore(on_cuda(kv), CUDA)
    expected = torch.zeros(NUM_LAYERS * store.layer_page_bytes, dtype=torch.uint8)
    digests = [ops.gather_pages(kv, torch.tensor([page]), 0, NUM_LAYERS, expected) for page in range(40)]
    slots = [torch.zeros(expected.numel(), dtype=torch.uint8, device=CUDA) for _ in range(40)]
    num_lanes = len(store._free)
    for _ in range(3):
        moves = [store.gather([page], 0, NUM_LAYERS, slots[page]) for page in range(40)]
        for moved, digest in zip(moves, digests, strict=True):
            moved.wait(5.0)
            assert moved.digest() == digest
        assert not store._free
        del moves, moved
        store._latest_gather = None
        assert num_lanes < len(store._free) == 40
    assert torch.equal(slots[39].cpu(), expected)

    many = [page % NUM_PAGES for page in range(3000)]
    big = torch.zeros(len(many) * store.layer_page_bytes, dtype=torch.uint8, device=CUDA)
    gathered = store.gather(many, 0, 1, big)
    gathered.wait(5.0)
    layer = torch.zeros(big.numel(), dtype=torch.uint8)
    assert gathered.digest() == ops.gather_pages(kv, torch.tensor(many), 0, 1, layer)
    assert torch.equal(big.cpu(), layer)


def test_step_after_a_fence_begins_when_what_moves_has_moved() -> None:
    kv = on_cuda(make_kv(0))
    store = CudaPageStore(kv, CUDA)
    page_ids = list(range(NUM_PAGES))
    before = kv.k[0].clone()
    slot = torch.empty(NUM_PAGES * NUM_LAYERS * store.layer_page_bytes, dtype=torch.uint8, device=CUDA)
    for _ in range(20):
        moved = store.gather(page_ids, 0, NUM_LAYERS, slot)
        store.fence()
        kv.k[0].zero_()  # as the next step would, had it been given the pages
        moved.wait(5.0)
        torch.cuda.synchronize()
        first_plane = slot[: before.numel() * 2].view(torch.bfloat16).view(before.shape)
        assert torch.equal(first_plane, before)
        kv.k[0].copy_(before)
        torch.cuda.synchronize()


def test_moving_does_not_wait_for_the_step_that_runs() -> None:
    kv = on_cuda(make_kv(0))
    store = CudaPageStore(kv, CUDA)
    slot = torch.empty(16 * store.layer_page_bytes, dtype=torch.uint8, device=CUDA)
    a = torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16)
    for _ in range(200):  # a third of a second of matmuls
        torch.mm(a, a)
    step = DeviceEvent(CUDA)
    store.gather(range(16), 0, 1, slot).wait(5.0)
    assert not step.done()
    torch.cuda.synchronize()


def test_stream_that_is_held_back_sees_what_was_gathered() -> None:
    """As a send does, which is posted while the pages are still being gathered."""
    source = make_kv(0)
    store = CudaPageStore(on_cuda(source), CUDA)
    page_ids = list(range(0, NUM_PAGES, 2))
    num_bytes = len(page_ids) * NUM_LAYERS * store.layer_page_bytes
    expected = torch.zeros(num_bytes, dtype=torch.uint8)
    digest = ops.gather_pages(source, torch.tensor(page_ids), 0, NUM_LAYERS, expected)
    slot = torch.zeros(num_bytes, dtype=torch.uint8, device=CUDA)
    sending = torch.cuda.Stream(CUDA)  # type: ignore[no-untyped-call]  # torch does not type its streams
    a = torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    with torch.cuda.stream(store._stream):
        for _ in range(20):  # the gather begins some 30 ms later
            torch.mm(a, a)
    gathered = store.gather(page_ids, 0, NUM_LAYERS, slot)
    gathered.hold_back(sending)
    with torch.cuda.stream(sending):
        sent = slot.clone()
    assert not gathered.done()
    sending.synchronize()
    assert torch.equal(sent.cpu(), expected)
    assert gathered.done() and gathered.digest() == digest


def late_bytes(slot: torch.Tensor, data: torch.Tensor) -> ArrivalEvent:
    """`data` comes into `slot` some 80 ms from now, as a receive brings it."""
    receiving, readers = torch.cuda.Stream(CUDA), torch.cuda.Stream(CUDA)  # type: ignore[no-untyped-call]
    a = torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    with torch.cuda.stream(receiving):
        for _ in range(50):
            torch.mm(a, a)
        slot.copy_(data)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch does not type its events
        event.record()
        return ArrivalEvent(event, cuda_driver(0), readers)


def queued_scatter(page_ids: list[int]) -> tuple[CudaPageStore, KVCache, ArrivalEvent, Moved, int]:
    """Of all layers of `source`'s pages, queued behind bytes that have not come."""
    source, target = make_kv(0), make_kv(1)
    store = CudaPageStore(on_cuda(target), CUDA)
    num_bytes = len(page_ids) * NUM_LAYERS * store.layer_page_bytes
    data = torch.zeros(num_bytes, dtype=torch.uint8)
    digest = ops.gather_pages(source, torch.tensor(page_ids), 0, NUM_LAYERS, data)
    slot = torch.zeros(num_bytes, dtype=torch.uint8, device=CUDA)
    on_device = data.to(CUDA)
    incoming = late_bytes(slot, on_device)
    moved = store.scatter(page_ids, 0, NUM_LAYERS, slot, after=incoming)
    return store, source, incoming, moved, digest


def test_scatter_waits_for_its_bytes_on_the_device() -> None:
    page_ids = [5, 60, 7, 21]
    store, source, incoming, moved, digest = queued_scatter(page_ids)
    assert not incoming.done() and not moved.done()
    moved.wait(5.0)
    assert moved.digest() == digest
    for layer in range(NUM_LAYERS):
        assert torch.equal(store._kv.k[layer][page_ids].cpu(), source.k[layer][page_ids])


def test_withdrawn_scatter_writes_nothing_and_holds_no_step_back() -> None:
    page_ids = [5, 60, 7, 21]
    store, _, incoming, moved, _ = queued_scatter(page_ids)
    before = make_kv(1)
    store.withdraw([moved])
    step = DeviceEvent(CUDA)
    assert not incoming.done(), "the bytes came too early for this test to mean anything"
    step.wait(5.0)
    assert not incoming.done()
    moved.wait(5.0)
    torch.cuda.synchronize()
    for layer in range(NUM_LAYERS):
        assert torch.equal(store._kv.k[layer].cpu(), before.k[layer])
        assert torch.equal(store._kv.v[layer].cpu(), before.v[layer])


def test_scatter_into_pages_that_were_taken_back_waits_for_the_one_before() -> None:
    """The bytes of that one have come: it may have read its page ids before they were overwritten."""
    page_ids = [5, 60, 7, 21]
    store = CudaPageStore(on_cuda(make_kv(1)), CUDA)
    slot = torch.zeros(len(page_ids) * store.layer_page_bytes, dtype=torch.uint8, device=CUDA)
    readers = torch.cuda.Stream(CUDA)  # type: ignore[no-untyped-call]  # torch does not type its streams
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    a = torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    with torch.cuda.stream(readers):
        for _ in range(50):
            torch.mm(a, a)
    before = store.scatter(page_ids, 0, 1, slot, after=ArrivalEvent(event, cuda_driver(0), readers))
    store.withdraw([before])
    after = store.scatter(page_ids, 0, 1, slot.clone())
    assert not before.done(), "the device was too fast for this test to mean anything"
    after.wait(5.0)
    assert before.done()
