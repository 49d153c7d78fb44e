"""The bodies of SGLang's native API, as far as Phloem honours them. Unknown request fields are ignored, but
those of `sampling_params` are refused."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from phloem.services.gateway.api.openai_types import CacheSalt, PhloemField
from phloem.services.gateway.sampling import SamplingFields


class NativeSampling(SamplingFields, kw_only=True, frozen=True):
    max_new_tokens: int | None = None
    sampling_seed: int | None = None  # SGLang's name of `seed`


class GenerateRequest(Struct, kw_only=True, frozen=True):
    """Exactly one of `text` and `input_ids`, single or a list."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: NativeSampling | None = None
    stream: bool | None = None
    cache_salt: CacheSalt | None = None


class NativeFinish(Struct, frozen=True):
    """`matched` is the stop string or token; `length` the number of generated tokens."""

    type: Literal["stop", "length"]
    matched: str | int | UnsetType | None = UNSET
    length: int | UnsetType = UNSET


class MetaInfo(Struct, frozen=True):
    id: str
    finish_reason: NativeFinish | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    e2e_latency: float | UnsetType = UNSET


class GenerateAnswer(Struct, frozen=True):
    """One sequence; `text` and `output_ids` are all so far. `index` comes in streams of several."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    index: int | UnsetType = UNSET
    phloem: PhloemField | UnsetType = UNSET


class ModelInfo(Struct, frozen=True, kw_only=True):
    model_path: str
    tokenizer_path: str
    served_model_name: str
    context_length: int
    vocab_size: int
    num_prefill_workers: int
    num_decode_workers: int
    num_unified_workers: int
    max_total_tokens: int
    max_running_requests: int
    is_generation: bool = True
    preferred_sampling_params: None = None
