"""SGLang's native routes: /generate, /get_model_info, /flush_cache."""

from __future__ import annotations

import asyncio

import msgspec
from litestar import MediaType, Response, get, post
from litestar.openapi import ResponseSpec
from litestar.types import ASGIApp
from msgspec import Struct

from phloem.services.gateway.api.access import call_of
from phloem.services.gateway.api.answer import Job, answering
from phloem.services.gateway.api.auth import ADMIN
from phloem.services.gateway.api.errors import HttpRequest
from phloem.services.gateway.api.json_body import decode_json
from phloem.services.gateway.api.native_answers import NativeDialect
from phloem.services.gateway.api.native_types import (
    GenerateAnswer,
    GenerateRequest,
    ModelInfo,
    NativeSampling,
)
from phloem.services.gateway.api.operations import body_of, gateway_of, takes_body
from phloem.services.gateway.api.prompts import completion_prompts, encoded
from phloem.services.gateway.api.refusals import (
    NATIVE_REFUSALS,
    NATIVE_SAMPLING_REFUSALS,
    refuse_unknown,
    refuse_unsupported,
)
from phloem.services.gateway.gateway import Gateway
from phloem.services.gateway.sampling import SamplingPlan, plan_sampling
from phloem.shared.errors import invalid_request, unavailable

DEFAULT_MAX_NEW_TOKENS = 128  # SGLang's
_FLUSH_TIMEOUT_S = 30.0
_PREFIX = "sampling_params."


@post(
    "/generate",
    status_code=200,
    operation_class=takes_body(GenerateRequest),
    responses={200: ResponseSpec(GenerateAnswer, description="One answer, a list, or a stream of events")},
    summary="Generate (SGLang)",
)
async def generate(request: HttpRequest) -> ASGIApp:
    """Goes on where a text or token ids stop."""
    gateway, call = gateway_of(request), call_of(request.scope)
    data = await body_of(request)
    body: GenerateRequest = decode_json(data, GenerateRequest)
    refuse_unsupported(data, NATIVE_REFUSALS)
    _refuse_sampling(_raw_sampling(data))
    sampling = _sampling(gateway, body.sampling_params or NativeSampling())
    prompts, param, single = _prompts(body, gateway.config.max_batch_prompts)

    job = Job(
        sampling=sampling,
        num_prompts=len(prompts),
        encode=lambda: encoded(gateway, prompts, param),
        param=param,
        cache_salt=body.cache_salt,
        continues_text=True,
        default_max_tokens=DEFAULT_MAX_NEW_TOKENS,
        dialect=NativeDialect(call, single=single and sampling.n == 1),
        stream=bool(body.stream),
    )
    return answering(gateway, call, job)


@get("/get_model_info", summary="The model and the cluster (SGLang)")
async def get_model_info(request: HttpRequest) -> ModelInfo:
    gateway = gateway_of(request)
    cluster = gateway.generator.model_info()
    return ModelInfo(
        model_path=gateway.model.path,
        tokenizer_path=gateway.model.path,
        served_model_name=gateway.model.name,
        context_length=gateway.context_length,
        vocab_size=gateway.model.vocab_size,
        num_prefill_workers=cluster.num_prefill_workers,
        num_decode_workers=cluster.num_decode_workers,
        num_unified_workers=cluster.num_unified_workers,
        max_total_tokens=cluster.max_total_tokens,
        max_running_requests=cluster.max_running_requests,
    )


@post(
    "/flush_cache",
    status_code=200,
    media_type=MediaType.TEXT,
    opt=ADMIN,
    summary="Empty every worker's prefix cache (SGLang)",
)
async def flush_cache(request: HttpRequest) -> Response[str]:
    """By POST alone: a link or an image of some web page must not empty the caches of a local cluster. (A
    script of one could send a POST, but has to say whose it is: see `origin`.)"""
    try:
        async with asyncio.timeout(_FLUSH_TIMEOUT_S):
            num_workers = await gateway_of(request).generator.flush_cache()
    except TimeoutError as error:
        raise unavailable(f"not every worker answered within {_FLUSH_TIMEOUT_S:g} s") from error
    return Response(f"Cache flushed on {num_workers} workers.\n", media_type=MediaType.TEXT)


class _RawSampling(Struct):
    sampling_params: msgspec.Raw = msgspec.Raw(b"null")


def _raw_sampling(data: bytes) -> bytes:
    """The JSON object of the sampling parameters, with the fields that no struct knows."""
    raw = bytes(decode_json(data, _RawSampling).sampling_params)
    return b"{}" if raw == b"null" else raw


def _refuse_sampling(raw: bytes) -> None:
    refuse_unsupported(raw, NATIVE_SAMPLING_REFUSALS, _PREFIX)
    refuse_unknown(raw, (*NativeSampling.__struct_fields__, *NATIVE_SAMPLING_REFUSALS), _PREFIX)


def _sampling(gateway: Gateway, fields: NativeSampling) -> SamplingPlan:
    if fields.seed is None and fields.sampling_seed is not None:
        fields = msgspec.structs.replace(fields, seed=fields.sampling_seed)
    return plan_sampling(
        fields,
        max_tokens=fields.max_new_tokens,
        max_tokens_param=f"{_PREFIX}max_new_tokens",
        config=gateway.config,
        check_tokens=gateway.check_tokens,
        prefix=_PREFIX,
    )


def _prompts(body: GenerateRequest, most: int) -> tuple[list[str | list[int]], str, bool]:
    """The prompts, the field that gave them, and whether it was a single one, not a list."""
    if (body.text is None) == (body.input_ids is None):
        raise invalid_request(
            "give exactly one of text and input_ids", param="text", code="missing_required_parameter"
        )
    if body.text is not None:
        return completion_prompts(body.text, "text", most), "text", isinstance(body.text, str)
    ids = body.input_ids or []
    prompts = completion_prompts(ids, "input_ids", most)
    return prompts, "input_ids", isinstance(ids[0], int)
