"""Loads a decoder: shape from config.json, weights from safetensors or from a seeded generator."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from phloem.shared.engine.models.decoder import Decoder
from phloem.shared.engine.models.parameters import DecoderParameters, ParameterFactory, prepare_parameters
from phloem.shared.engine.models.registry import WeightNames, find_architecture
from phloem.shared.engine.weights.files import shards, stored_dtype
from phloem.shared.engine.weights.slots import weight_slots
from phloem.shared.errors import ConfigError, PhloemError
from phloem.shared.model_store.model_config import ModelConfig, load_model_config

log = logging.getLogger(__name__)

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DUMMY_SEED = 0
DUMMY_STD = 0.02


def load_decoder(
    model_dir: Path,
    *,
    load_format: str,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> Decoder:
    """Builds the model of `model_dir` on `device`.

    load_format `auto` and `safetensors` read the directory's safetensors, shard by shard and tensor by
    tensor from the mapped file: the weights never lie in memory twice. `dummy` draws them at random,
    seeded, and needs config.json only. `progress(done, total)` counts parameters.

    Raises PhloemError: `unsupported_model`, `not_a_model`, or `bad_weights` that names the tensor.
    """
    config = load_model_config(model_dir)
    names = find_architecture(config).names
    parameters = ParameterFactory(config, dtype, device).make()
    match load_format:
        case "dummy":
            _fill_dummy(parameters, names, config)
        case "auto" | "safetensors":
            _fill_from_files(model_dir, parameters, names, config, progress)
        case _:
            supported = "auto, safetensors, dummy"
            raise ConfigError(f"load format {load_format!r} is unknown; use one of {supported}")
    return Decoder(config, prepare_parameters(parameters))


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the model; nothing is allocated. Raises `unsupported_model`."""
    names = find_architecture(config).names
    shapes = ParameterFactory(config, torch.float32, torch.device("meta")).make()
    return sum(slot.numel() for slot in weight_slots(shapes, names, config).values())


def resolve_dtype(name: str, model_dir: Path, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations. `auto` is the model's own on a GPU, and float32 on a CPU; a named
    one is taken whatever the weights are stored in, which are converted to it.

    In bfloat16 the demo model's first answer is within rounding of another one, and which comes out depends
    on how the prompt was cut into chunks; `bfloat16` is there for who prefers twice the speed. Raises
    `ConfigError` for a name that is none, and where the model's own is one that no kernel computes in.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else _own_dtype(model_dir)
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is unknown; use auto, {', '.join(DTYPES)}", param="dtype")
    return DTYPES[name]


def _own_dtype(model_dir: Path) -> torch.dtype:
    """What config.json says. Where it says nothing, what most weights are stored in; bfloat16 where there are
    none, as for a shape."""
    if named := load_model_config(model_dir).dtype:
        return _computable(named, f"{model_dir / 'config.json'} has the dtype {named!r}")
    stored = stored_dtype(model_dir)
    if stored is None:
        log.warning("%s names no dtype and holds no weights: taking bfloat16", model_dir / "config.json")
        return torch.bfloat16
    found = _computable(stored, f"the weights of {model_dir} are stored in {stored!r}")
    log.info("config.json names no dtype: taking %s, which most of the weights are stored in", stored)
    return found


def _computable(name: str, what: str) -> torch.dtype:
    if name in DTYPES:
        return DTYPES[name]
    *others, last = DTYPES
    raise ConfigError(
        f"{what}, and the engine computes in {', '.join(others)} or {last}: give --dtype bfloat16, to "
        "convert the weights as they are loaded",
        param="dtype",
    )


def _fill_dummy(parameters: DecoderParameters, names: WeightNames, config: ModelConfig) -> None:
    generator = torch.Generator(device=parameters.embedding.device).manual_seed(DUMMY_SEED)
    for slot in weight_slots(parameters, names, config).values():
        if slot.dim() == 1:
            slot.fill_(1.0)  # norms; a bias of 1 does no harm here
        else:
            slot.normal_(0.0, DUMMY_STD, generator=generator)


def _fill_from_files(
    model_dir: Path,
    parameters: DecoderParameters,
    names: WeightNames,
    config: ModelConfig,
    progress: Callable[[int, int], None],
) -> None:
    waiting = weight_slots(parameters, names, config)
    total = sum(slot.numel() for slot in waiting.values())
    done = 0
    for path in shards(model_dir):
        for name, tensor in _tensors(path):
            if _is_ignored(name, names, config):
                continue
            slot = waiting.pop(name, None)
            if slot is None:
                raise _bad_weights(f"{path} holds {name!r}, which {config.architecture} has no place for")
            _fill(slot, tensor, name, path)
            done += slot.numel()
            progress(done, total)
    if waiting:
        raise _bad_weights(f"{model_dir} lacks the tensor {next(iter(waiting))!r} ({len(waiting)} missing)")


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The file's tensors as views of the mapped file, on the CPU."""
    try:
        with safe_open(path, framework="pt", device="cpu") as shard:
            for name in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, shard.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise _bad_weights(f"{path} cannot be read ({error}); fetch it again") from error


def _is_ignored(name: str, names: WeightNames, config: ModelConfig) -> bool:
    return name.endswith(names.ignored_suffixes) or (config.tied_embeddings and name == names.lm_head)


def _fill(slot: Tensor, tensor: Tensor, name: str, path: Path) -> None:
    if slot.shape != tensor.shape:
        found, expected = tuple(tensor.shape), tuple(slot.shape)
        raise _bad_weights(f"{path}: {name!r} has shape {found}, config.json asks for {expected}")
    slot.copy_(tensor)


def _bad_weights(message: str) -> PhloemError:
    return PhloemError("bad_weights", message, param="model_path")
