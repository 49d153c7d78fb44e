"""The flags of `phloem bench serve`, and the run's options made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Group, Parameter

from phloem.shared.bench.arrivals import Arrival, parse_ramp
from phloem.shared.bench.datasets.options import DatasetName, DatasetOptions
from phloem.shared.bench.lengths import parse_lengths
from phloem.shared.bench.options import LoadOptions, RunOptions, SearchOptions, TargetOrder
from phloem.shared.bench.protocol import ApiName, TargetSpec
from phloem.shared.bench.session import PromptKind
from phloem.shared.bench.slo import parse_duration, parse_slo
from phloem.shared.errors import ConfigError

DEFAULT_URL = "http://127.0.0.1:30000"
_DEFAULT_PROMPTS = 64
_DEFAULT_CONCURRENCY = 4

_TARGETS = Group("Targets", sort_key=1)
_DATASET = Group("Dataset", sort_key=2)
_LOAD = Group("Load", sort_key=3)
_VERDICT = Group("Verdict", sort_key=4)
_OUTPUT = Group("Output", sort_key=5)


@Parameter(name="*", group=_TARGETS)
@dataclass(frozen=True, kw_only=True)
class TargetFlags:
    """Which servers, and how they are asked."""

    target: Annotated[
        tuple[str, ...],
        Parameter(negative="", help="URL, or NAME=URL; repeat it to compare servers in one run"),
    ] = (DEFAULT_URL,)
    api: Annotated[ApiName, Parameter(help="/v1/completions, /v1/chat/completions or SGLang's /generate")] = (
        "completions"
    )
    model: Annotated[str, Parameter(help="default: the first that the server lists")] = ""
    api_key: Annotated[str, Parameter(env_var="PHLOEM_BENCH_API_KEY", help="sent as a bearer token")] = ""
    extra_body: Annotated[str, Parameter(help="JSON object: more members for every request")] = ""
    temperature: float = 0.0
    ignore_eos: Annotated[bool, Parameter(help="make every answer as long as asked for")] = True
    order: Annotated[
        TargetOrder, Parameter(help="several targets: in turn (--rounds), or all under load together")
    ] = "alternate"
    rounds: Annotated[
        int | None, Parameter(help="blocks that the run is cut into [default: 1; 10 with several targets]")
    ] = None
    flush_cache: Annotated[bool, Parameter(help="POST /flush_cache before every block")] = False
    timeout: Annotated[str, Parameter(help="of one request")] = "10m"


@Parameter(name="*", group=_DATASET)
@dataclass(frozen=True, kw_only=True)
class DatasetFlags:
    """What is sent."""

    dataset: DatasetName = "random"
    dataset_path: Annotated[
        Path | None, Parameter(help="file of trace (Mooncake's or Azure's format), sharegpt, jsonl")
    ] = None
    input_len: Annotated[str, Parameter(help="tokens of a prompt or of each turn: N or LOW:HIGH")] = "256"
    output_len: Annotated[
        str, Parameter(help="tokens to ask for: N or LOW:HIGH [default: what the dataset recorded, else 64]")
    ] = ""
    prompt_as: Annotated[
        PromptKind | None, Parameter(help="[default: token ids; messages with --api chat]")
    ] = None
    token_ids: Annotated[str, Parameter(help="LOW:HIGH of random token ids [default: 1000:30000]")] = ""
    tokenizer: Annotated[str, Parameter(help="tokenizer.json, or its directory: checks all counts")] = ""
    groups: Annotated[int, Parameter(help="shared-prefix: number of prefixes")] = 16
    prefix_len: Annotated[int, Parameter(help="shared-prefix: tokens of a prefix")] = 1024
    zipf: Annotated[float, Parameter(help="shared-prefix: groups weigh 1 / rank**ZIPF")] = 1.0
    turns: Annotated[int | None, Parameter(help="of a conversation [default: 1; multi-turn: 4]")] = None
    think_time: Annotated[str, Parameter(help="between an answer and the next turn")] = "0s"
    time_scale: Annotated[float, Parameter(help="traces: stretches their gaps; 0.5 is twice as fast")] = 1.0
    max_input_len: Annotated[int, Parameter(help="traces, sharegpt: leaves longer ones out; 0: none")] = 0
    max_output_len: Annotated[int, Parameter(help="cuts what is asked for; 0: never")] = 0
    seed: int = 0


@Parameter(name="*", group=_LOAD)
@dataclass(frozen=True, kw_only=True)
class LoadFlags:
    """How it is sent."""

    concurrency: Annotated[
        str, Parameter(help="closed loop: N in flight, or FIRST:LAST; with --request-rate a cap")
    ] = ""
    request_rate: Annotated[
        str, Parameter(help="open loop: sessions/s, FIRST:LAST, or inf [default: a trace's own times]")
    ] = ""
    arrival: Arrival = "poisson"
    burst_size: Annotated[int, Parameter(help="with --arrival burst")] = 8
    ramp: Annotated[str, Parameter(help="duration of FIRST:LAST [default: the whole run]")] = "0s"
    num_prompts: Annotated[int | None, Parameter(help="requests per target [default: 64]")] = None
    duration: Annotated[str, Parameter(help="sends for so long, per target; in flight ones may end")] = "0s"
    warmup_requests: Annotated[int, Parameter(help="per target, not measured")] = 1
    clients: Annotated[int, Parameter(help="client processes that share the load")] = 1


@Parameter(name="*", group=_VERDICT)
@dataclass(frozen=True, kw_only=True)
class VerdictFlags:
    """What counts as good, and when a run is no run."""

    slo: Annotated[str, Parameter(help="per request: ttft:500ms,itl:30ms (also tpot, e2e, itl.max, ...)")] = (
        ""
    )
    find_rate: Annotated[
        bool, Parameter(help="look for the highest rate that holds --slo, from --request-rate on")
    ] = False
    slo_share: Annotated[str, Parameter(help="find-rate: requests that must be good")] = "90%"
    find_precision: Annotated[str, Parameter(help="find-rate: how near")] = "5%"
    allow_failures: Annotated[str, Parameter(help="share of failed requests that is put up with")] = "0%"
    max_lag: Annotated[
        str, Parameter(help="p99 of the client's own lag [default: 20% of the median gap, at least 2ms]")
    ] = ""


@Parameter(name="*", group=_OUTPUT)
@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """Where it goes."""

    output: Annotated[
        Path | None, Parameter(name=["--output", "-o"], help="JSON with every request (.json or .json.gz)")
    ] = None
    plot: Annotated[Path | None, Parameter(help="CDFs and timeline: .html, or .png with phloem[bench]")] = (
        None
    )
    save_text: Annotated[bool, Parameter(help="keep the answers in the JSON")] = False


def run_options(
    targets: TargetFlags, data: DatasetFlags, load: LoadFlags, verdict: VerdictFlags, output: OutputFlags
) -> RunOptions:
    """Raises `ConfigError` for a value that can't be read."""
    kind = data.prompt_as or ("messages" if targets.api == "chat" else "tokens")
    return RunOptions(
        targets=tuple(_target(text, index, targets) for index, text in enumerate(targets.target)),
        dataset=_dataset(data),
        load=_load(load, data.dataset),
        prompt_kind=kind,
        token_ids=_token_ids(data.token_ids),
        tokenizer=data.tokenizer,
        seed=data.seed,
        objectives=parse_slo(verdict.slo),
        search=_search(verdict) if verdict.find_rate else None,
        order=targets.order,
        num_rounds=_rounds(targets, load),
        num_clients=load.clients,
        timeout_s=parse_duration(targets.timeout),
        allowed_failures=parse_share(verdict.allow_failures),
        max_lag_ms=parse_duration(verdict.max_lag) * 1e3 if verdict.max_lag else None,
        flush_cache=targets.flush_cache,
        save_text=output.save_text,
    )


def parse_share(text: str) -> float:
    """0.05 from "5%" or "0.05". Raises `ConfigError`."""
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(f"{text!r} is no share: write 5% or 0.05")
    return share


def _target(text: str, index: int, flags: TargetFlags) -> TargetSpec:
    name, separator, url = text.partition("=")
    if not separator or "/" in name:
        name, url = f"target-{index + 1}" if len(flags.target) > 1 else "target", text
    headers = (("authorization", f"Bearer {flags.api_key}"),) if flags.api_key else ()
    return TargetSpec(
        name=name,
        url=url.rstrip("/"),
        api=flags.api,
        model=flags.model,
        headers=headers,
        extra_body=_extra_body(flags.extra_body),
        temperature=flags.temperature,
        ignore_eos=flags.ignore_eos,
    )


def _extra_body(text: str) -> bytes:
    if not text:
        return b""
    try:
        body = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError as error:
        raise ConfigError(f"--extra-body is not a JSON object: {error}") from error
    return msgspec.json.encode(body)[1:-1]


def _dataset(flags: DatasetFlags) -> DatasetOptions:
    default_output = "64" if flags.dataset in ("random", "shared-prefix", "multi-turn") else ""
    output = flags.output_len or default_output
    return DatasetOptions(
        name=flags.dataset,
        path=str(flags.dataset_path or ""),
        input_lengths=parse_lengths(flags.input_len, "--input-len"),
        output_lengths=parse_lengths(output, "--output-len") if output else None,
        prefix_tokens=flags.prefix_len,
        num_groups=max(flags.groups, 1),
        num_turns=max(flags.turns or (4 if flags.dataset == "multi-turn" else 1), 1),
        zipf=flags.zipf,
        think_s=parse_duration(flags.think_time),
        time_scale=flags.time_scale,
        max_input_tokens=flags.max_input_len,
        max_output_tokens=flags.max_output_len,
    )


def _load(flags: LoadFlags, dataset: DatasetName) -> LoadOptions:
    duration_s = parse_duration(flags.duration)
    rates = parse_ramp(flags.request_rate, "--request-rate") if flags.request_rate else (0.0, 0.0)
    places = parse_ramp(flags.concurrency, "--concurrency") if flags.concurrency else (0.0, 0.0)
    if not flags.request_rate and not flags.concurrency and dataset != "trace":
        places = (_DEFAULT_CONCURRENCY, _DEFAULT_CONCURRENCY)
    has_ramp = places[0] != places[1]
    ramp_s = parse_duration(flags.ramp)
    if has_ramp and not (ramp_s or duration_s):
        raise ConfigError("--concurrency FIRST:LAST needs --ramp or --duration: the time that it takes")
    num_prompts = flags.num_prompts or (0 if duration_s else _DEFAULT_PROMPTS)
    return LoadOptions(
        concurrency=int(places[1]),
        initial_concurrency=int(places[0]) if has_ramp else int(places[1]),
        first_rate=rates[0],
        last_rate=rates[1],
        arrival=flags.arrival,
        burst_size=max(flags.burst_size, 1),
        ramp_s=ramp_s,
        duration_s=duration_s,
        num_prompts=num_prompts,
        warmup_requests=flags.warmup_requests,
    )


def _rounds(targets: TargetFlags, load: LoadFlags) -> int:
    """With several targets ten, or as many as there are requests to share out."""
    if targets.rounds is not None:
        return targets.rounds
    if len(targets.target) == 1 or targets.order == "together":
        return 1
    return max(1, min(10, load.num_prompts or _DEFAULT_PROMPTS))


def _search(flags: VerdictFlags) -> SearchOptions:
    return SearchOptions(share=parse_share(flags.slo_share), precision=parse_share(flags.find_precision))


def _token_ids(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    lengths = parse_lengths(text, "--token-ids")
    return lengths.low, lengths.high
