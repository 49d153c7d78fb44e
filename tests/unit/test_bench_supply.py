"""How sessions become requests: rounds, schedules, warm-up, JSON, and the events that come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phloem.shared.bench.client.dialect import RequestWriter
from phloem.shared.bench.client.sse import EventSplitter
from phloem.shared.bench.datasets.options import DatasetOptions
from phloem.shared.bench.datasets.registry import make_sessions
from phloem.shared.bench.lengths import LengthRange
from phloem.shared.bench.options import LoadOptions
from phloem.shared.bench.plan import SessionSupply, requests_of_round, schedule, warmup_sessions
from phloem.shared.bench.prompt_source import make_source
from phloem.shared.bench.protocol import ApiName, TargetSpec
from phloem.shared.bench.session import PromptKind, join_pieces, text_json
from phloem.shared.errors import ConfigError
from tests.support.bench_sessions import MOONCAKE, take


def test_rounds_share_out_all_requests() -> None:
    assert sum(requests_of_round(103, 10, index) for index in range(10)) == 103
    assert requests_of_round(0, 10, 0) == 0


def test_supplies_of_two_targets_are_the_same_sessions() -> None:
    options = DatasetOptions(name="multi-turn", num_turns=3)
    supplies = [SessionSupply(lambda: make_sessions(options, make_source("tokens", None), 4)) for _ in "ab"]
    first, second = ([list(supply.take(7)), list(supply.take(2))] for supply in supplies)
    assert first == second
    assert [len(sessions) for sessions in first] == [3, 1]
    assert first[1][0].session_id == 3


def test_schedule_of_an_open_loop_is_cut_at_the_duration() -> None:
    load = LoadOptions(first_rate=10, last_rate=10, arrival="constant")
    timed = schedule(
        iter(take(DatasetOptions(), 50)), load, num_requests=0, duration_s=1.0, num_turns=1, seed=0
    )
    assert [session.start_s for session in timed] == pytest.approx([index / 10 for index in range(10)])


def test_schedule_of_a_trace_starts_each_block_at_zero(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in MOONCAKE))
    later = take(DatasetOptions(name="trace", path=str(path)), 9)[1:]
    timed = schedule(iter(later), LoadOptions(), num_requests=2, duration_s=0, num_turns=1, seed=0)
    assert [session.start_s for session in timed] == [0.0, 1.0]
    closed = schedule(
        iter(later), LoadOptions(concurrency=2), num_requests=2, duration_s=0, num_turns=1, seed=0
    )
    assert all(session.start_s < 0 for session in closed)


def test_warm_up_is_as_long_as_the_dataset_and_none_of_it() -> None:
    sessions = take(DatasetOptions(input_lengths=LengthRange(40, 60)), 4)
    warm = list(warmup_sessions(iter(sessions), make_source("tokens", None), 3, seed=0))
    assert [w.turns[0].num_added_tokens for w in warm] == [s.turns[0].num_added_tokens for s in sessions[:3]]
    assert not {w.turns[0].added for w in warm} & {s.turns[0].added for s in sessions}


@pytest.mark.parametrize(
    ("api", "kind", "pieces", "expected"),
    [
        ("completions", "tokens", [b"1,2", b"3"], {"prompt": [1, 2, 3], "max_tokens": 9}),
        ("completions", "text", [text_json('a"b'), b" c"], {"prompt": 'a"b c', "max_tokens": 9}),
        ("chat", "messages", [b'{"role":"user"}', b'{"role":"assistant"}'], {"max_tokens": 9}),
        ("generate", "tokens", [b"5"], {"input_ids": [5]}),
        ("generate", "text", [b"hi"], {"text": "hi"}),
    ],
)
def test_requests_are_the_apis_json(
    api: ApiName, kind: PromptKind, pieces: list[bytes], expected: dict[str, Any]
) -> None:
    spec = TargetSpec(
        name="t", url="http://h/v1", api=api, model="m", headers=(("a", "b"),), extra_body=b'"x":{"y":1}'
    )
    head, _, body = RequestWriter(spec, "h", "/v1").request("id-7", kind, pieces, 9).partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] in (
        "POST /v1/completions HTTP/1.1",
        "POST /v1/chat/completions HTTP/1.1",
        "POST /generate HTTP/1.1",
    )
    assert {"x-request-id: id-7", "a: b", f"content-length: {len(body)}"} <= set(lines)
    request = json.loads(body)
    assert request["stream"] is True
    assert request["x"] == {"y": 1}
    assert expected.items() <= request.items()
    sampling = request["sampling_params"] if api == "generate" else request
    assert sampling["ignore_eos"] is True
    assert sampling["temperature"] == 0
    if api == "generate":
        assert sampling["max_new_tokens"] == 9
    else:
        assert request["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


def test_a_prompt_that_the_api_cannot_take_is_refused() -> None:
    writer = RequestWriter(TargetSpec(name="t", url="http://h", api="chat"), "h", "")
    with pytest.raises(ConfigError, match="takes no tokens prompt"):
        writer.request("id", "tokens", [b"1"], 1)


def test_join_of_an_empty_answer_keeps_text_whole() -> None:
    assert join_pieces("text", [b"a", b"", b"b"]) == b"ab"


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_cut_the_same_however_the_bytes_come(newline: bytes, size: int) -> None:
    stream = newline.join(
        [
            b": ping",
            b"",
            b"data: one",
            b"",
            b"event: x",
            b"data:two",
            b"data: lines",
            b"",
            b"data: [DONE]",
            b"",
            b"",
        ]
    )
    splitter = EventSplitter()
    events = []
    for start in range(0, len(stream), size):
        events += splitter.feed(stream[start : start + size])
    assert events == [b"one", b"two\nlines", b"[DONE]"]
