"""`phloem bench transfer` and the proofs of a pair: what they judge and refuse, and that they can fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.pair.loads import gaps_while_all_run
from phloem.cli.bench.transfer_flags import gpus_of
from phloem.cli.up.config import UpConfig
from phloem.cli.up.plan import require_gpu_each
from phloem.shared.bench.bars import all_met
from phloem.shared.bench.result import SavedRecord
from phloem.shared.bench.statistics import Summary, summarize
from phloem.shared.engine.config import EngineConfig, EngineOptions
from phloem.shared.engine.fault_injection import Faults, damaging
from phloem.shared.errors import ConfigError, ErrorInfo, PhloemError
from phloem.shared.model_store.model_config import load_model_config
from phloem.shared.protocol.session import Ended, PeerRef, SamplingParams, TokensOut
from phloem.shared.protocol.transfer import Piece
from phloem.shared.transfer.events import PieceReceived, TransferEvent
from phloem.shared.transfer.staging import StagingSlot
from phloem.shared.transfer_bench.bandwidth import BandwidthReport, SizeResult
from phloem.shared.transfer_bench.equality import EqualityReport, Question, explain, make_questions, report_of
from phloem.shared.transfer_bench.exposure import Exposed, SlowDown
from phloem.shared.transfer_bench.lab import HandOver
from phloem.shared.transfer_bench.memory import growth_mib, resident_mib
from phloem.shared.transfer_bench.models import ModelShape, write_model, write_weights
from phloem.shared.transfer_bench.rank_protocol import KvShape
from phloem.shared.transfer_bench.run import bars_of, parse_sizes
from phloem.shared.transfer_bench.streams import EngineStream

MIB = 2**20


def _bandwidth(*sizes: SizeResult) -> BandwidthReport:
    return BandwidthReport(
        device="d",
        shape=KvShape(),
        page_bytes=MIB,
        staging_bytes=1,
        staging_slots=1,
        max_ctas=1,
        sizes=list(sizes),
    )


def _summary(value: float) -> Summary:
    summary = summarize([value])
    assert summary is not None
    return summary


def _exposed(tokens: int, ms: float) -> Exposed:
    one = _summary(ms)
    return Exposed(
        prompt_tokens=tokens,
        num_bytes=1,
        prefill_ms=one,
        first_gap_ms=one,
        step_ms=1.0,
        beyond_step_ms=one,
        exposed_ms=one,
    )


def _slow(what: str, ratio: float) -> SlowDown:
    return SlowDown(what=what, without_ms=1.0, with_ms=ratio, ratios=[ratio])


@pytest.mark.parametrize(
    ("ratio", "exposed_ms", "prefill", "p99", "missed"),
    [
        (0.95, 5.0, 1.02, 1.2, 0),
        (0.85, 5.0, 1.02, 1.2, 1),
        (0.95, 6.5, 1.02, 1.2, 2),  # median and maximum
        (0.95, 5.0, 1.04, 1.2, 1),
        (0.95, 5.0, 1.02, 1.3, 1),
    ],
)
def test_bars_of_issue_4_are_judged_on_gpus_only(
    ratio: float, exposed_ms: float, prefill: float, p99: float, missed: int
) -> None:
    report = _bandwidth(
        SizeResult(num_bytes=16 * MIB, raw=1.0, raw_ahead=1.0, pages=0.1, ratio=0.1),
        SizeResult(num_bytes=256 * MIB, raw=1.0, raw_ahead=1.0, pages=ratio, ratio=ratio),
    )
    exposed = [_exposed(1024, 99.0), _exposed(8192, exposed_ms)]
    slow = [_slow("prefill of 8192 tokens", prefill), _slow("decode, median", 9.0), _slow("decode, p99", p99)]
    bars = bars_of(report, exposed, slow, judged=True)
    assert sum(not bar.is_met for bar in bars) == missed
    assert all_met(bars_of(report, exposed, slow, judged=False))


def test_sizes_are_mib() -> None:
    assert parse_sizes("1, 256") == (MIB, 256 * MIB)
    assert parse_sizes("") == ()
    for text in ("0", "1,x", "-4"):
        with pytest.raises(ConfigError):
            parse_sizes(text)


@pytest.mark.parametrize(
    ("device", "named", "num_gpus", "pair"),
    [
        ("auto", None, 0, None),
        ("cpu", None, 2, None),
        ("auto", None, 2, (0, 1)),
        ("auto", "1,0", 2, (1, 0)),
        ("cuda", "3,1", 4, (3, 1)),
    ],
)
def test_pair_of_gpus(device: str, named: str | None, num_gpus: int, pair: tuple[int, int] | None) -> None:
    assert gpus_of(device, named, num_gpus) == pair


def test_gpus_are_not_named_for_a_cpu() -> None:
    with pytest.raises(ConfigError, match="--gpus 0,1 and --device cpu"):
        gpus_of("cpu", "0,1", 2)


@pytest.mark.parametrize(
    ("device", "named", "num_gpus"),
    [
        ("auto", None, 1),
        ("auto", "0,0", 0),
        ("auto", "0,1", 0),
        ("cuda", None, 0),
        ("cuda", "0,1", 0),
        ("cuda", "0,0", 2),
        ("cuda", "0,2", 2),
        ("cuda", "0", 2),
    ],
)
def test_less_than_two_gpus_are_refused_with_a_way_out(device: str, named: str | None, num_gpus: int) -> None:
    with pytest.raises(ConfigError, match=r"--gpus") as caught:
        gpus_of(device, named, num_gpus)
    if named is None or "," in named:
        assert "--unified 1" in str(caught.value) and "--device cpu" in str(caught.value)


# -- two workers on one GPU --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "num_gpus"),
    [
        (UpConfig(), 1),
        (UpConfig(prefill=2, decode=1), 2),
        (UpConfig(prefill=1, decode=1, unified=1), 2),
        (UpConfig(engine=EngineOptions(device="cuda")), 1),
        (UpConfig(engine=EngineOptions(device="cuda:0")), 2),
    ],
)
def test_workers_that_hand_over_and_would_share_a_gpu_are_refused(config: UpConfig, num_gpus: int) -> None:
    with pytest.raises(ConfigError, match=rf"--prefill 0 --decode 0 --unified {num_gpus}") as caught:
        require_gpu_each(config, num_gpus)
    assert "--device cpu" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "num_gpus"),
    [
        (UpConfig(), 0),
        (UpConfig(), 2),
        (UpConfig(prefill=2, decode=2), 4),
        (UpConfig(prefill=0, decode=0, unified=3), 1),
        (UpConfig(prefill=0, decode=0, unified=1), 1),
        (UpConfig(engine=EngineOptions(device="cpu")), 1),
    ],
)
def test_other_counts_are_not(config: UpConfig, num_gpus: int) -> None:
    require_gpu_each(config, num_gpus)


# -- damage ------------------------------------------------------------------------------------------------


def _piece(number: int) -> PieceReceived:
    data = torch.zeros(64, dtype=torch.uint8)
    header = Piece(f"r{number}", 1, 0, 1, 0, 1, 64, 0)
    return PieceReceived(PeerRef("p", 1), header, data, StagingSlot(0, "c", data))


def test_only_the_named_pieces_are_altered() -> None:
    seen: list[TransferEvent] = []
    deliver = damaging(Faults(corrupt_pieces=(1, 3)), seen.append)
    pieces = [_piece(number) for number in range(5)]
    for piece in pieces:
        deliver(piece)
    assert seen == pieces
    assert [int(piece.data.count_nonzero()) for piece in pieces] == [0, 1, 0, 1, 0]


def test_nothing_stands_between_where_no_fault_is_asked_for() -> None:
    deliver: Callable[[TransferEvent], None] = lambda event: None  # noqa: E731 - its identity is the point
    assert damaging(Faults(), deliver) is deliver


def test_no_option_reaches_the_faults() -> None:
    assert "faults" in EngineConfig.__struct_fields__
    assert not [name for name in EngineOptions.__struct_fields__ if "fault" in name or "corrupt" in name]


# -- equality ----------------------------------------------------------------------------------------------


def _question(name: str, *, abort: bool = False) -> Question:
    sampling = SamplingParams(max_tokens=4, temperature=0.0)
    return Question(name, [1, 2], sampling, abort_after_s=0.1 if abort else None)


def _pair(name: str, tokens: list[int], ended: str = "finished", error: str = "") -> HandOver:
    prefill, decode = EngineStream(name), EngineStream(name)
    prefill.take(TokensOut(name, 1, 0, tokens[:1]), 0.0)
    prefill.take(Ended(name, 1, "handed_over"), 0.0)
    if tokens[1:]:
        decode.take(TokensOut(name, 1, 1, tokens[1:]), 0.0)
    info = ErrorInfo(error, "m") if error else None
    decode.take(Ended(name, 1, ended, info), 0.0)  # type: ignore[arg-type]  # one of its literals
    return HandOver(prefill, decode)


def _report(question: Question, pair: HandOver, expected: list[int]) -> EqualityReport:
    return report_of([question, _question("ok")], [expected, [5, 6]], [pair, _pair("ok", [5, 6])], 0)


def test_report_holds_for_equal_tokens_and_for_the_beginning_of_an_aborted_request() -> None:
    assert _report(_question("a"), _pair("a", [1, 2, 3]), [1, 2, 3]).holds
    report = _report(_question("a", abort=True), _pair("a", [1, 2], "aborted"), [1, 2, 3])
    assert report.holds
    assert (report.num_complete, report.num_aborted) == (1, 1)
    assert (report.num_aborted_early, report.num_aborted_between) == (0, 0)


def test_report_says_which_requests_were_aborted_while_their_kv_was_on_its_way() -> None:
    report = _report(_question("a", abort=True), _pair("a", [1], "aborted"), [1, 2, 3])
    assert report.holds and (report.num_aborted_early, report.num_aborted_between) == (0, 1)
    report = _report(_question("a", abort=True), _pair("a", [], "aborted"), [1, 2, 3])
    assert report.holds and (report.num_aborted_early, report.num_aborted_between) == (1, 0)


@pytest.mark.parametrize(
    ("question", "pair"),
    [
        (_question("a"), _pair("a", [1, 2, 4])),
        (_question("a"), _pair("a", [1, 2])),
        (_question("a"), _pair("a", [1, 2, 3, 4])),
        (_question("a", abort=True), _pair("a", [1, 9], "aborted")),
        (_question("a"), _pair("a", [1], "failed", "kv_digest_mismatch")),
        (_question("a"), _pair("a", [1, 2], "aborted")),
        (_question("a", abort=True), _pair("a", [1], "failed", "kv_digest_mismatch")),
    ],
)
def test_report_does_not_hold_for_anything_else(question: Question, pair: HandOver) -> None:
    report = _report(question, pair, [1, 2, 3])
    assert not report.holds
    assert [line for line in explain(report) if line.startswith(("DIFFERS a", "FAILED a"))]


def test_questions_cover_lengths_sampling_and_aborts() -> None:
    questions = make_questions(200, longest_prompt=16_000, most_tokens=24, vocabulary=512)
    lengths = sorted(len(question.token_ids) for question in questions)
    assert (lengths[0], lengths[-1]) == (1, 16_000) and 40 < lengths[100] < 400
    assert sum(length >= 12_000 for length in lengths) >= 3 and lengths[-8] >= 8000
    assert sum(question.is_aborted for question in questions) == 50
    assert sum(question.abort_after_tokens == 0 for question in questions) >= 8
    greedy = sum(question.sampling.temperature == 0 for question in questions)
    assert 70 <= greedy <= 130
    assert all(2 <= token < 512 for question in questions for token in question.token_ids)
    assert make_questions(200, longest_prompt=16_000, most_tokens=24, vocabulary=512) == questions


def test_stream_that_goes_on_after_its_end_is_a_fault() -> None:
    pair = _pair("a", [1, 2])
    with pytest.raises(PhloemError, match="after its end"):
        pair.decode.take(TokensOut("a", 1, 2, [3]), 0.0)


# -- parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["llama-3.1-8b", "exact", "tiny"])
def test_shapes_are_models(shape: ModelShape, tmp_path: Path) -> None:
    config = load_model_config(write_model(shape, tmp_path / "m"))
    assert config.context_length >= 16_384 + 64
    if shape == "llama-3.1-8b":
        committed = json.loads(Path("benchmarks/models/llama-3.1-8b/config.json").read_text())
        assert (config.num_layers, config.hidden_size, config.vocab_size) == (
            committed["num_hidden_layers"],
            committed["hidden_size"],
            committed["vocab_size"],
        )


def test_written_weights_make_attention_peaky(tmp_path: Path) -> None:
    tensors = load_file(write_weights(write_model("tiny", tmp_path)) / "model.safetensors")
    assert len(tensors) == 3 + 4 * 9
    assert abs(float(tensors["model.layers.0.self_attn.q_proj.weight"].std()) - 1.5 / 8) < 0.01


def test_memory_growth_leaves_out_the_first_sample_and_sees_a_leak() -> None:
    assert growth_mib([50.0, 100.0, 101.0, 100.0, 101.0, 100.0, 101.0]) <= 1.0
    assert growth_mib([100.0 + 10 * n for n in range(30)]) > 150
    assert growth_mib([5.0]) == 0.0
    transient = [
        100.0,
        100.0,
        360.0,
        100.0,
        360.0,
        100.0,
        100.0,
    ]  # a lost channel's buffers, not returned yet
    assert growth_mib(transient) == 0.0 and growth_mib([*transient, 120.0, 120.0, 120.0]) == 20.0


def test_resident_memory_is_of_a_process() -> None:
    import os

    assert 20 < resident_mib(os.getpid()) < 100_000


def test_gaps_count_only_while_every_stream_runs() -> None:
    def record(sent_s: float, chunk_ms: list[float]) -> SavedRecord:
        return SavedRecord(
            id="r",
            block=0,
            session=0,
            turn=0,
            sent_s=sent_s,
            scheduled_s=sent_s,
            e2e_ms=chunk_ms[-1],
            max_tokens=9,
            chunk_ms=chunk_ms,
        )

    first = record(0.0, [10.0, 500.0, 510.0, 521.0, 533.0])
    second = record(0.4, [100.0, 111.0, 133.0, 900.0])  # on the same clock: 500, 511, 533, 1300
    assert gaps_while_all_run([first, second]) == [10.0, 11.0, 12.0, 11.0, 22.0]
