"""Token counts: the server's, completed and checked with a tokenizer."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from phloem.shared.bench.record import RequestRecord
from phloem.shared.bench.timing import chunk_token_counts
from phloem.shared.bench.token_counter import TokenCounter

_TOLERANCE = 0.02
# A beginning-of-sequence token that the server adds to a prompt of ids or plain text.
_PROMPT_SLACK = 1


class CheckedRecords(NamedTuple):
    """Records with the counts filled in that the server left out; `retokenized` is the number of output
    tokens by the tokenizer (None without one); `remarks` are findings for the report."""

    records: list[RequestRecord]
    retokenized: int | None
    remarks: list[str]


def check_tokens(records: Sequence[RequestRecord], counter: TokenCounter | None) -> CheckedRecords:
    """Never replaces what the server said: a difference is a remark."""
    remarks = _prompt_remarks(records)
    if counter is None:
        if any(record.succeeded and record.output_tokens < 0 for record in records):
            remarks.append("the server sends no usage: without --tokenizer token counts are unknown")
        return CheckedRecords(list(records), None, remarks)
    counts = [counter.count("".join(record.pieces)) if record.succeeded else 0 for record in records]
    pairs = list(zip(records, counts, strict=True))
    filled = [_filled(record, count, counter) for record, count in pairs]
    if any(record.succeeded and record.output_tokens < 0 for record in records):
        remarks.append("the server sends no usage: output tokens are the tokenizer's count")
    return CheckedRecords(filled, sum(counts), remarks + _output_remarks(pairs))


def _filled(record: RequestRecord, count: int, counter: TokenCounter) -> RequestRecord:
    if not record.succeeded:
        return record
    if record.output_tokens < 0:
        record = msgspec.structs.replace(record, output_tokens=count)
    if chunk_token_counts(record) is None and record.pieces:
        per_chunk = array("I", [max(counter.count(piece), 1) for piece in record.pieces])
        record = msgspec.structs.replace(record, chunk_tokens=per_chunk.tobytes())
    return record


def _output_remarks(pairs: Sequence[tuple[RequestRecord, int]]) -> list[str]:
    said = [(record.output_tokens, count) for record, count in pairs if record.output_tokens >= 0]
    total, found = sum(number for number, _ in said), sum(count for _, count in said)
    if not total or abs(found - total) <= _TOLERANCE * total:
        return []
    return [
        f"the server counts {total} output tokens, the tokenizer finds {found} in their text: a wrong "
        "--tokenizer, or tokens without text (random prompts make such answers)"
    ]


def _prompt_remarks(records: Sequence[RequestRecord]) -> list[str]:
    known = [
        record
        for record in records
        if record.succeeded and record.prompt_tokens >= 0 and record.expected_prompt_tokens
    ]
    wrong = [
        record
        for record in known
        if abs(record.prompt_tokens - record.expected_prompt_tokens) > _PROMPT_SLACK
    ]
    if not wrong:
        return []
    first = wrong[0]
    return [
        f"{len(wrong)} of {len(known)} prompts have another length for the server than they were made with "
        f"(the first: {first.prompt_tokens} instead of {first.expected_prompt_tokens} tokens)"
    ]
