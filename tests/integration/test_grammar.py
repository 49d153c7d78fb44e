"""The real model under real grammars, on the CPU: what it answers is what was asked for, to the letter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from phloem.shared.engine.config import EngineOptions
from phloem.shared.protocol.session import Grammar, SamplingParams
from tests.support.built_engine import BuiltEngine, built_engine

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["tea", "coffee"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
AS_PERSON = Grammar("json_schema", json.dumps(PERSON))
DATE = Grammar("regex", r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
SHORT = SamplingParams(max_tokens=16, temperature=0.0)
ANSWER = Grammar("ebnf", 'root ::= ("yes" | "no") "."')


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))


@pytest.fixture(scope="module")
def engine(smollm2_dir: Path) -> Iterator[BuiltEngine]:
    options = EngineOptions(
        model_path=str(smollm2_dir), device="cpu", max_total_tokens=4096, max_running_requests=8
    )
    with built_engine(options) as engine:
        yield engine


def prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    ids: list[int] = tokenizer.encode(text).ids
    return ids


def sampling(grammar: Grammar, seed: int | None = None) -> SamplingParams:
    heat = 0.0 if seed is None else 1.0
    return SamplingParams(max_tokens=72, temperature=heat, seed=seed or 0, grammar=grammar)


def test_answers_are_what_their_grammars_say(engine: BuiltEngine, tokenizer: Tokenizer) -> None:
    """Greedy and hot, several kinds in one batch, beside requests without a grammar."""
    person = prompt(tokenizer, "Describe a person as JSON with name, age and likes.")
    engine.submit("plain before", person, len(person), SHORT)
    alone = engine.run()["plain before"].token_ids
    jobs = {"greedy": (person, None), "hot": (person, 7), "hotter": (person, 8)}
    for request_id, (tokens, seed) in jobs.items():
        engine.submit(request_id, tokens, len(tokens), sampling(AS_PERSON, seed))
    for request_id, grammar in (("date", DATE), ("answer", ANSWER)):
        question = prompt(tokenizer, "When was the moon landing? Was it in July?")
        engine.submit(request_id, question, len(question), sampling(grammar))
    engine.submit("plain", person, len(person), SHORT)
    done = engine.run()
    texts = {request_id: tokenizer.decode(stream.token_ids) for request_id, stream in done.items()}
    for request_id in jobs:
        assert done[request_id].finish_reason == "stop", texts[request_id]
        found = json.loads(texts[request_id])
        assert set(found) == {"name", "age", "likes"}
        assert isinstance(found["name"], str) and 0 <= found["age"] <= 120
        assert 1 <= len(found["likes"]) <= 2 and set(found["likes"]) <= {"tea", "coffee"}
    assert re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", texts["date"])
    assert texts["answer"] in ("yes.", "no.")
    assert done["plain"].token_ids == alone


def test_resumed_answer_is_the_one_that_would_have_been(engine: BuiltEngine, tokenizer: Tokenizer) -> None:
    """Some of the tokens come with the submission, as after the loss of a worker."""
    tokens = prompt(tokenizer, "Describe a person as JSON with name, age and likes.")
    engine.submit("whole", tokens, len(tokens), sampling(AS_PERSON, 5))
    whole = engine.run()["whole"].token_ids
    for count in (1, len(whole) - 2):
        engine.submit("rest", tokens + whole[:count], len(tokens), sampling(AS_PERSON, 5))
        assert engine.run()["rest"].token_ids == whole[count:]
