"""Whether captured decode steps are made of the decode kernels, and what they need beside the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from phloem.kernels import ops
from phloem.shared.engine.config import EngineOptions
from phloem.shared.engine.cooperative_steps import make_cooperative_steps
from phloem.shared.engine.cuda_runner import DecodeParts
from phloem.shared.engine.decode_tables import DecodeTables
from phloem.shared.engine.models.decode_pass import DecodePass, decode_shape

if TYPE_CHECKING:
    from phloem.shared.engine.runners import LoadedModel


def decode_parts(
    options: EngineOptions, model: LoadedModel, max_pages: int, is_alone: Callable[[], bool]
) -> DecodeParts | None:
    """None where the decode kernels can't serve the model, or no step is captured: then the decoder's own
    forward pass does it all."""
    config = model.decoder.config
    if options.disable_cuda_graph or options.disable_decode_kernels or any(config.layer_windows):
        return None
    shape = decode_shape(config)
    kernels = ops.decode_kernels(shape, model.dtype, model.device, options.max_running_requests + 1)
    if kernels is None:
        return None
    cooperative = None
    if not options.disable_cooperative_decode:
        cooperative = make_cooperative_steps(model, kernels, is_alone)
    tables = DecodeTables(
        model.device,
        num_slots=options.max_running_requests + 1,
        max_pages=max_pages,
        page_size=options.page_size,
        num_kv_heads=config.num_kv_heads,
        sharing=cooperative.sharing if cooperative is not None else None,
    )
    cos, sin = model.decoder.rope.halves(model.context_length + 1, model.dtype)
    return DecodeParts(DecodePass(model.decoder, kernels), tables, cos, sin, cooperative)
