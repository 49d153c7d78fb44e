"""The gateway's flags."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from phloem.services.gateway.cluster.options import ClusterOptions
from phloem.shared.config.member_options import MemberOptions


class GatewayConfig(MemberOptions, frozen=True, kw_only=True):
    """Everything a gateway needs. Names follow SGLang's where the meaning is the same.

    `model_path` is what the user gave; the gateway reads only its tokenizer, chat template and `config.json`.
    """

    host: Annotated[str, Meta(min_length=1, description="address that HTTP binds to")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="HTTP port; 0: a free one")] = 30000
    model_path: Annotated[
        str, Meta(min_length=1, description="a GGUF file, a Hugging Face directory, or a hub id")
    ] = "smollm2-135m-instruct"
    served_model_name: Annotated[
        str, Meta(max_length=256, description="name in requests; empty: the model path's last part")
    ] = ""
    chat_template: Annotated[
        str, Meta(description="a jinja file that replaces the model's own chat template; empty: the model's")
    ] = ""
    chat_template_kwargs: Annotated[
        tuple[str, ...],
        Meta(description="the names that a request's chat_template_kwargs may set"),
    ] = ("enable_thinking", "thinking")
    advertise_host: Annotated[
        str, Meta(description="address that others reach this gateway at; empty: the --host")
    ] = ""
    gateway_id: Annotated[
        str,
        Meta(max_length=128, pattern=r"^[A-Za-z0-9._-]*$", description="name of this replica; empty: random"),
    ] = ""
    api_key: Annotated[
        tuple[str, ...],
        Meta(description="bearer keys, one per tenant; when any is set every route but /health asks for one"),
    ] = ()
    admin_api_key: Annotated[
        str, Meta(description="bearer key for /flush_cache and /debug; may do all that an API key may")
    ] = ""

    allow_anonymous: Annotated[
        bool,
        Meta(
            description="without --api-key: listen beyond loopback too, and serve foreign web pages; whoever "
            "reaches the port is served"
        ),
    ] = False

    cluster: ClusterOptions = ClusterOptions()

    # Bounds on one request: each is checked before anything of that size is allocated.
    max_body_bytes: Annotated[
        int, Meta(ge=1024, le=1 << 30, description="longest request body; over it: 413")
    ] = 8 * 1024 * 1024
    body_timeout_s: Annotated[
        float, Meta(gt=0, le=3600, description="longest time that a request body may take to arrive")
    ] = 60.0
    max_messages: Annotated[int, Meta(ge=1, le=1_000_000, description="most messages of a chat")] = 4096
    max_batch_prompts: Annotated[
        int, Meta(ge=1, le=65_536, description="most prompts in one completion request")
    ] = 128
    max_n: Annotated[int, Meta(ge=1, le=1024, description="largest n")] = 16
    max_stop_strings: Annotated[int, Meta(ge=0, le=1024, description="most stop strings")] = 16
    max_stop_chars: Annotated[int, Meta(ge=1, le=65_536, description="longest stop string")] = 512
    max_stop_token_ids: Annotated[int, Meta(ge=0, le=65_536, description="most stop_token_ids")] = 128
    default_max_tokens: Annotated[
        int, Meta(ge=0, description="max_tokens of a request that has none; 0: what fits the context")
    ] = 0

    # Bounds on time and on all requests together.
    request_timeout_s: Annotated[
        float, Meta(gt=0, le=86_400, description="longest time from a request to its last token")
    ] = 600.0
    chat_template_timeout_s: Annotated[
        float, Meta(gt=0, le=60, description="longest time that a chat template may run")
    ] = 2.0
    health_generate_timeout_s: Annotated[
        float, Meta(gt=0, le=600, description="deadline of /health_generate")
    ] = 20.0
    max_inflight_requests: Annotated[
        int, Meta(ge=1, le=1_000_000, description="most sequences (prompts x n) under way; over it: 503")
    ] = 1024
    max_inflight_per_key: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000_000,
            description="the same for one API key; over it: 429; 0: half, where there are several keys",
        ),
    ] = 0
    tokenizer_threads: Annotated[int, Meta(ge=1, le=64, description="threads that tokenise prompts")] = 2
    drain_timeout_s: Annotated[
        float, Meta(ge=0, le=3600, description="longest wait for requests under way when told to stop")
    ] = 30.0

    @property
    def inflight_limit_per_key(self) -> int:
        """The bound for one API key: unless it is set, one of several can't take the last place from all
        others, and a single one may have all."""
        if self.max_inflight_per_key:
            return self.max_inflight_per_key
        return -(-self.max_inflight_requests // 2) if len(self.api_key) > 1 else self.max_inflight_requests
