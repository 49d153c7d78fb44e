"""From flags to a warm model on its device: backend, weights, KV pool, graphs.

Every stage that can run out of memory ends with a sentence on which number to change and what would fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from phloem.shared.engine.backend import Backend, ModelFacts
from phloem.shared.engine.config import EngineOptions
from phloem.shared.engine.memory import (
    PoolWish,
    StepSizes,
    check_weights,
    plan_pool,
    pool_not_allocated,
    step_too_large,
    weights_too_large,
)
from phloem.shared.engine.models.decoder import Decoder
from phloem.shared.engine.models.kv_cache import KVCache, bytes_per_page
from phloem.shared.engine.rehearsal import MemoryGauge, measure_overhead, memory_gauge
from phloem.shared.engine.runners import LoadedModel, build_runner, log, pick_backend, warm_up_runner
from phloem.shared.engine.sizing import channels_reserve, context_length, host_pool_pages
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

    def run(self) -> tuple[LoadedModel, StepRunner]:
        facts = ModelFacts(str(self._dtype).removeprefix("torch."), self._config.head_dim)
        backend = pick_backend(self._options, self._device, facts, self._send)
        decoder = self._weights(facts.dtype)
        model = self._allocate(decoder, self.num_pages_of_pool(decoder, backend))
        runner = self._runner(model, backend, self._send)
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

    def num_pages_of_pool(self, decoder: Decoder, backend: Backend) -> int:
        """How many pages requests get, once the weights are loaded."""
        options = self._options
        page_bytes = bytes_per_page(self._config, options.page_size, self._dtype)
        if self._device.type != "cuda":
            return host_pool_pages(options, page_bytes, self._length)
        self._gauge.release()
        memory = self._gauge.read()
        self._send(Progress("memory", 0, 1))
        tokens = min(options.chunked_prefill_size, self._length)
        num_pages = max(-(-tokens // options.page_size), options.max_running_requests)
        overhead = measure_overhead(
            self._gauge, lambda: self._rehearse(decoder, backend, num_pages), (num_pages + 1) * page_bytes
        )
        self._send(Progress("memory", 1, 1))
        wish = PoolWish(
            page_bytes,
            options.page_size,
            self._length,
            options.mem_fraction_static,
            options.max_total_tokens,
        )
        plan = plan_pool(wish, memory, overhead + channels_reserve(options))
        if plan.note is not None:
            log.warning("%s", plan.note)
        return plan.num_pages

    def _rehearse(self, decoder: Decoder, backend: Backend, num_pages: int) -> object:
        """A runner over a small pool, after its largest step; whoever drops it frees what it holds."""

        def in_the_background(message: EngineUp) -> None:
            if isinstance(message, Progress):
                self._send(Progress("memory", message.done, message.total + 1))

        # Tables are as wide as the real pool's may need.
        model = self._allocate(decoder, num_pages)._replace(context_length=self._length)
        runner = self._runner(model, backend, in_the_background)
        self._warm_up(model, runner)
        return runner, model

    def _allocate(self, decoder: Decoder, num_pages: int) -> LoadedModel:
        page_size = self._options.page_size
        # What doesn't fit into the pool alone is refused at the door, not when it has been half answered.
        length = min(self._length, num_pages * page_size)
        memory = self._gauge.read()
        page_bytes = bytes_per_page(self._config, page_size, self._dtype)
        with out_of_memory_as(lambda: pool_not_allocated(num_pages, page_bytes, page_size, memory)):
            # One page more than the pool knows: padding rows of a CUDA graph write there.
            kv = KVCache.allocate(self._config, num_pages + 1, page_size, self._dtype, self._device)
        return LoadedModel(decoder, kv, self._device, self._dtype, length, num_pages)

    def _runner(self, model: LoadedModel, backend: Backend, send: Send) -> StepRunner:
        with self._step_fits(capturing=not self._options.disable_cuda_graph):
            return build_runner(self._options, model, backend, send, self._is_alone)

    def _warm_up(self, model: LoadedModel, runner: StepRunner) -> None:
        with self._step_fits(capturing=False):
            warm_up_runner(self._options, model, runner)

    @contextmanager
    def _step_fits(self, *, capturing: bool) -> Iterator[None]:
        options, memory = self._options, self._gauge.read()
        sizes = StepSizes(
            options.chunked_prefill_size,
            options.max_running_requests,
            0 if options.disable_cuda_graph else options.cuda_graph_max_bs,
        )
        with out_of_memory_as(
            lambda: step_too_large(self._config, self._dtype.itemsize, sizes, memory, capturing=capturing)
        ):
            yield


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
