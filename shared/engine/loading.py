"""From flags to a warm model on its device: backend, weights, KV pool, graphs.

Every stage that can run out of memory ends with a sentence on which number to change and what would fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from phloem.shared.engine.backend import Backend, ModelFacts
from phloem.shared.engine.config import EngineOptions
from phloem.shared.engine.memory import (
    BesidePool,
    PoolWish,
    check_weights,
    plan_pool,
    pool_not_allocated,
    weights_too_large,
)
from phloem.shared.engine.models.decoder import Decoder
from phloem.shared.engine.models.kv_cache import KVCache, bytes_per_page
from phloem.shared.engine.models.registry import find_activation
from phloem.shared.engine.rehearsal import MemoryGauge, measure_overhead, memory_gauge
from phloem.shared.engine.runners import LoadedModel, build_runner, log, pick_backend, warm_up_runner
from phloem.shared.engine.sizing import channels_reserve, context_length, host_pool_pages
from phloem.shared.engine.step_advice import (
    Rehearsal,
    graphs_of,
    graphs_too_large,
    pages_of,
    rehearsal_failed,
    step_of,
    step_too_large,
)
from phloem.shared.engine.step_memory import StepSizes, step_cost
from phloem.shared.engine.step_runner import StepRunner
from phloem.shared.engine.weights.loader import count_parameters, load_decoder, resolve_dtype
from phloem.shared.errors import PhloemError
from phloem.shared.model_store.model_config import load_model_config
from phloem.shared.protocol.engine import EngineUp, Progress

Send = Callable[[EngineUp], None]

_NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def load_model(
    options: EngineOptions,
    device: torch.device,
    send: Send,
    is_alone: Callable[[], bool] = lambda: True,
) -> tuple[LoadedModel, StepRunner]:
    """The model of `options`, which are `for_device`'s, and its warm runner; `is_alone` as in `build_runner`.

    Raises `PhloemError` with a remedy: a backend that can't run, bad weights, `out_of_memory`.
    """
    return ModelLoading(options, device, send, memory_gauge(device), is_alone).run()


class ModelLoading:
    """One run of `load_model`, and what its stages share."""

    def __init__(
        self,
        options: EngineOptions,
        device: torch.device,
        send: Send,
        gauge: MemoryGauge,
        is_alone: Callable[[], bool] = lambda: True,
    ) -> None:
        self._options = options
        self._is_alone = is_alone
        self._device = device
        self._send = send
        self._model_dir = Path(options.model_path)
        self._config = load_model_config(self._model_dir)
        self._dtype = resolve_dtype(options.dtype, self._model_dir, device)
        self._length = context_length(options, self._config)
        self._gauge = gauge
        self._page_bytes = bytes_per_page(self._config, options.page_size, self._dtype)
        self._sizes = StepSizes(
            options.chunked_prefill_size,
            options.max_running_requests,
            0 if options.disable_cuda_graph else options.cuda_graph_max_bs,
        )
        self._cost = step_cost(self._config, self._dtype.itemsize)

    def run(self) -> tuple[LoadedModel, StepRunner]:
        config = self._config
        facts = ModelFacts(
            str(self._dtype).removeprefix("torch."),
            config.head_dim,
            has_windows=any(config.layer_windows),
            activation=find_activation(config),
        )
        backend = pick_backend(self._options, self._device, facts, self._send)
        decoder = self._weights(facts.dtype)
        model = self._allocate_pool(decoder, self.pool(decoder, backend))
        runner = self._runner(model, backend)
        self._send(Progress("warmup", 0, 1))
        self._warm_up(model, runner)
        self._send(Progress("warmup", 1, 1))
        return model, runner

    # -- stages ----------------------------------------------------------------------------------------

    def _weights(self, dtype_name: str) -> Decoder:
        need = count_parameters(self._config) * self._dtype.itemsize
        memory = self._gauge.read()
        check_weights(need, dtype_name, memory)
        self._send(Progress("weights", 0, 1))
        with out_of_memory_as(lambda: weights_too_large(need, dtype_name, memory)):
            return load_decoder(
                self._model_dir,
                load_format=self._options.load_format,
                dtype=self._dtype,
                device=self._device,
                progress=_by_percent(self._send),
            )

    def pool(self, decoder: Decoder, backend: Backend) -> PoolSize:
        """How many pages requests get, once the weights are loaded."""
        options = self._options
        if self._device.type != "cuda":
            return PoolSize(host_pool_pages(options, self._page_bytes, self._length))
        self._gauge.release()
        memory = self._gauge.read()
        self._send(Progress("memory", 0, 1))
        rehearsal = self._rehearsal()
        measured = measure_overhead(
            self._gauge,
            lambda: self._rehearse(decoder, backend, rehearsal),
            rehearsal.pool_bytes(self._sizes),
        )
        self._send(Progress("memory", 1, 1))
        wish = PoolWish(
            self._page_bytes,
            options.page_size,
            self._length,
            options.mem_fraction_static,
            options.max_total_tokens,
        )
        beside = BesidePool(measured, rehearsal.channels, rehearsal.one_channel, self._sizes, self._cost)
        plan = plan_pool(wish, memory, beside)
        if plan.note is not None:
            log.warning("%s", plan.note)
        return PoolSize(plan.num_pages, beside.total)

    def _rehearse(self, decoder: Decoder, backend: Backend, rehearsal: Rehearsal) -> object:
        """A runner over a small pool, after its largest step; whoever drops it frees what it holds."""
        memory, sizes = self._gauge.read(), self._sizes

        def failed(what: str) -> Callable[[], PhloemError]:
            return lambda: rehearsal_failed(what, rehearsal, memory)

        def in_the_background(message: EngineUp) -> None:
            if isinstance(message, Progress):
                self._send(Progress("memory", message.done, message.total + 1))

        step = step_of(sizes, self._cost)
        model = self._allocate(decoder, rehearsal.num_pages(sizes), failed(pages_of(rehearsal)))
        # Tables are as wide as the real pool's may need.
        model = model._replace(context_length=self._length)
        with out_of_memory_as(failed(graphs_of(sizes) if sizes.graph_rows else step)):
            runner = build_runner(self._options, model, backend, in_the_background, self._is_alone)
        with out_of_memory_as(failed(step)):
            warm_up_runner(self._options, model, runner)
        return runner, model

    def _rehearsal(self) -> Rehearsal:
        return Rehearsal(
            self._sizes,
            self._cost,
            self._page_bytes,
            self._options.page_size,
            self._length,
            channels_reserve(self._options),
            channels_reserve(self._options, num_peers=1),
        )

    def _allocate(self, decoder: Decoder, num_pages: int, failed: Callable[[], PhloemError]) -> LoadedModel:
        page_size = self._options.page_size
        # What doesn't fit into the pool alone is refused at the door, not when it has been half answered.
        length = min(self._length, num_pages * page_size)
        with out_of_memory_as(failed):
            # One page more than the pool knows: padding rows of a CUDA graph write there.
            kv = KVCache.allocate(self._config, num_pages + 1, page_size, self._dtype, self._device)
        return LoadedModel(decoder, kv, self._device, self._dtype, length, num_pages)

    def _allocate_pool(self, decoder: Decoder, pool: PoolSize) -> LoadedModel:
        memory, page_size = self._gauge.read(), self._options.page_size
        return self._allocate(
            decoder,
            pool.num_pages,
            lambda: pool_not_allocated(pool.num_pages, self._page_bytes, page_size, memory, pool.beside),
        )

    def _runner(self, model: LoadedModel, backend: Backend) -> StepRunner:
        memory, sizes = self._gauge.read(), self._sizes
        too_large = graphs_too_large if sizes.graph_rows else step_too_large
        with out_of_memory_as(lambda: too_large(sizes, self._cost, memory)):
            return build_runner(self._options, model, backend, self._send, self._is_alone)

    def _warm_up(self, model: LoadedModel, runner: StepRunner) -> None:
        memory = self._gauge.read()
        with out_of_memory_as(lambda: step_too_large(self._sizes, self._cost, memory)):
            warm_up_runner(self._options, model, runner)


class PoolSize(NamedTuple):
    """`beside`: bytes of the device that are to stay free beside it."""

    num_pages: int
    beside: int = 0


@contextmanager
def out_of_memory_as(explain: Callable[[], PhloemError]) -> Iterator[None]:
    """Turns torch's out-of-memory errors, of a device or of the host, into what `explain` returns, and
    raises that."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        raise explain() from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, CUDA, cuBLAS or Python says that memory has run out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error) for words in _NO_MEMORY
    )


def _by_percent(send: Send) -> Callable[[int, int], None]:
    """Reports the weights' progress at most a hundred times."""
    shown = -1

    def report(done: int, total: int) -> None:
        nonlocal shown
        percent = 100 * done // max(1, total)
        if percent > shown:
            shown = percent
            send(Progress("weights", percent, 100))

    return report
