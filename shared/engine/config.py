"""What an engine process is told: the first frame that it reads from its front."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct

from phloem.shared.engine.fault_injection import Faults
from phloem.shared.protocol.cluster import Role
from phloem.shared.protocol.codec import Codec
from phloem.shared.telemetry.logs import LogOptions

DtypeName: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat: TypeAlias = Literal["auto", "safetensors", "dummy"]
AttentionBackend: TypeAlias = Literal["auto", "flashinfer", "triton", "torch"]
SchedulePolicy: TypeAlias = Literal["fcfs", "lpm"]

GPU_MEM_FRACTION = 0.85  # what `mem_fraction_static` 0 means on a GPU


class EngineOptions(Struct, frozen=True, kw_only=True):
    """The engine flags of every worker role; names follow SGLang where the meaning is the same."""

    model_path: Annotated[
        str, Meta(description="a GGUF file, a Hugging Face directory (safetensors), or a hub id")
    ] = "smollm2-135m-instruct"
    tp: Annotated[int, Meta(ge=1, le=1, description="tensor-parallel ranks (1 in this version)")] = 1
    device: Annotated[
        str, Meta(pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    ] = "auto"
    dtype: Annotated[
        DtypeName,
        Meta(
            description="of weights and activations, whatever the weights are stored in; auto: the model's "
            "own on a GPU, float32 on a CPU"
        ),
    ] = "auto"
    load_format: Annotated[LoadFormat, Meta(description="dummy: random seeded weights")] = "auto"
    context_length: Annotated[
        int, Meta(ge=0, le=10_000_000, description="longest prompt + output; 0: the model's own")
    ] = 0
    page_size: Annotated[int, Meta(ge=1, le=64, description="tokens per KV page; must divide 64")] = 16
    max_total_tokens: Annotated[
        int, Meta(ge=0, description="size of the KV pool in tokens; 0: from --mem-fraction-static")
    ] = 0
    mem_fraction_static: Annotated[
        float,
        Meta(
            ge=0.0,
            lt=1.0,
            description="share of a GPU's memory for weights and KV pages; on a CPU, of the RAM free beside "
            "the weights for KV pages; 0: 0.85 of a GPU, and 0.125 on a CPU, up to 131072 tokens or "
            "--context-length",
        ),
    ] = 0.0
    chunked_prefill_size: Annotated[
        int,
        Meta(ge=0, le=1_048_576, description="most tokens of one engine step; 0: 8192 on CUDA, else 2048"),
    ] = 0
    max_mixed_prefill_tokens: Annotated[
        int,
        Meta(
            ge=0,
            le=1_048_576,
            description="most prompt tokens of a step that decodes too; 0: 1024 on CUDA, unbounded on a CPU",
        ),
    ] = 0
    max_running_requests: Annotated[
        int, Meta(ge=0, le=4096, description="most requests with a slot at once; 0: 256 on CUDA, else 64")
    ] = 0
    max_queued_requests: Annotated[
        int, Meta(ge=1, le=1_000_000, description="more than these are refused with 503")
    ] = 1024
    schedule_policy: Annotated[
        SchedulePolicy, Meta(description="fcfs, or lpm: longest prefix match first")
    ] = "fcfs"
    disable_radix_cache: Annotated[bool, Meta(description="never reuse a prefix")] = False
    disable_overlap_schedule: Annotated[
        bool, Meta(description="wait for each step's results before planning the next")
    ] = False
    attention_backend: Annotated[
        AttentionBackend,
        Meta(description="auto: flashinfer on CUDA where it has a kernel, else triton; torch on a CPU"),
    ] = "auto"
    disable_cuda_graph: Annotated[bool, Meta(description="run decode steps eagerly")] = False
    disable_decode_kernels: Annotated[
        bool,
        Meta(description="capture decode steps of the library's kernels instead of Phloem's own"),
    ] = False
    disable_cooperative_decode: Annotated[
        bool,
        Meta(
            description="no kernels whose blocks wait for each other in decode steps of up to 64 requests. "
            "They are faster, need all of a Hopper GPU at once, and rest while KV channels are open"
        ),
    ] = False
    cuda_graph_max_bs: Annotated[
        int, Meta(ge=0, le=4096, description="largest batch with a CUDA graph; 0: --max-running-requests")
    ] = 0
    num_threads: Annotated[
        int, Meta(ge=0, le=1024, description="CPU threads of the engine; 0: all cores, waiting passively")
    ] = 0
    staging_bytes: Annotated[
        int, Meta(ge=65_536, le=1 << 30, description="bytes of one staging slot for KV transfer")
    ] = 128 * 1024 * 1024
    staging_slots: Annotated[
        int, Meta(ge=1, le=64, description="most staging slots of one channel, on each side")
    ] = 4
    transfer_peers: Annotated[
        int,
        Meta(
            ge=0,
            le=256,
            description="workers that this one exchanges KV with at a time; staging memory for them is set "
            "aside at start: --staging-bytes for each, and --staging-slots times that for the first; "
            "0: 8, and 2 for a unified worker",
        ),
    ] = 0
    transfer_max_ctas: Annotated[
        int,
        Meta(ge=1, le=32, description="multiprocessors that KV transfer over NCCL may use; 16: 310 GB/s"),
    ] = 16
    transfer_timeout_s: Annotated[
        float, Meta(gt=0.0, le=600.0, description="deadline of one KV transfer operation")
    ] = 10.0
    handover_timeout_s: Annotated[
        float, Meta(gt=0.0, le=3600.0, description="longest wait of one side of a hand-over for the other")
    ] = 60.0

    def __post_init__(self) -> None:
        """Refuses what contradicts itself, before anything is imported or loaded."""
        if 64 % self.page_size:
            raise ValueError(f"--page-size {self.page_size} must divide 64: give 1, 2, 4, 8, 16, 32 or 64")
        if self.device == "cpu" and self.attention_backend not in ("auto", "torch"):
            named = f"--attention-backend {self.attention_backend}"
            raise ValueError(f"{named} needs a CUDA device: with --device cpu use torch")
        if self.dtype == "float32" and self.attention_backend == "flashinfer":
            raise ValueError(
                "--attention-backend flashinfer has no float32 kernels: use --dtype bfloat16, or triton"
            )


class EngineConfig(Struct, frozen=True, kw_only=True):
    """Everything an engine needs; `options.model_path` is a resolved directory by now."""

    worker_id: str
    epoch: int
    role: Role
    host: str  # address that the transfer endpoint binds to
    cluster_secret: bytes
    options: EngineOptions
    faults: Faults = Faults()  # of tests only; no flag sets it
    hang_timeout_s: float = 120.0  # a step that takes longer will not end: the engine gives up
    logs: LogOptions = LogOptions()


engine_config: Codec[EngineConfig] = Codec(EngineConfig)
