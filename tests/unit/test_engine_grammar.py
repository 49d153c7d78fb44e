"""Requests with a grammar in the engine's turns: masks in time, exact words, nobody else disturbed."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from phloem.shared.engine.grammar.desk import MAX_ORDERED, MAX_SOURCE_CHARS
from phloem.shared.engine.requests import Request
from phloem.shared.protocol.engine import EngineAbort
from phloem.shared.protocol.session import Grammar, SamplingParams, Submit
from tests.support.engine_world import EOS, EngineWorld, next_tokens
from tests.support.grammar_world import (
    DEADLINE_S,
    FailingCompiler,
    MaskedDevice,
    SlowCompiler,
    World,
)

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "bb"]}, "n": {"enum": [1, 22]}},
    "required": ["ok", "kind", "n"],
}
OBJECT = Grammar("json_schema", json.dumps(SCHEMA))


def text_of(token_ids: list[int]) -> str:
    return "".join(chr(31 + token) for token in token_ids if token != EOS)


def tokens_of(text: str) -> list[int]:
    return [ord(letter) - 31 for letter in text]


@pytest.fixture(params=[(True, True), (False, True), (True, False)], ids=["ahead", "sync", "no overlap"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    runs_ahead, overlap = request.param
    world = World(runs_ahead=runs_ahead, overlap=overlap)
    yield world
    world.desk.close()


def test_answers_are_words_of_their_grammar_and_others_are_left_alone(world: World) -> None:
    plain = world.submit("plain", [1, 2, 3], 40)
    streams = [world.submit(f"r{index}", [index + 1] * 5, 90, grammar=OBJECT) for index in range(4)]
    vowels = world.submit("vowels", [9], 90, grammar=Grammar("regex", "[aeiou]{7}"))
    world.turn()
    world.compiled(2)
    world.assert_idle()
    for stream in streams:
        answer = json.loads(text_of(stream.token_ids))
        assert sorted(answer) == ["kind", "n", "ok"]
        assert answer["ok"] in (True, False) and answer["kind"] in ("a", "bb") and answer["n"] in (1, 22)
        assert stream.finish_reason == "stop" and stream.token_ids[-1] == EOS
    assert len({text_of(stream.token_ids) for stream in streams}) > 1
    assert len(text_of(vowels.token_ids)) == 7 and set(text_of(vowels.token_ids)) <= set("aeiou")
    assert plain.token_ids == next_tokens([1, 2, 3], 40)


def test_masks_are_filled_while_the_device_is_ahead() -> None:
    world = World()
    world.submit("r", [1], 60, grammar=Grammar("regex", "[ab]{50}"))
    world.turn()
    world.compiled()
    world.assert_idle()
    assert isinstance(world.device, MaskedDevice)
    assert world.device.most_in_flight == 2
    assert world.device.num_held_behind >= 49
    world.desk.close()


def test_request_waits_in_the_queue_for_its_grammar_and_not_the_step(world: World) -> None:
    stream = world.submit("r", [1, 2], 60, grammar=OBJECT)
    other = world.submit("other", [3], 8)
    world.turn_until(lambda: other.ended)
    world.compiled()
    assert other.token_ids == next_tokens([3], 8)
    world.assert_idle()
    assert json.loads(text_of(stream.token_ids))


def test_grammar_is_compiled_once(world: World) -> None:
    for index in range(5):
        world.submit(f"r{index}", [1, 2], 60, grammar=OBJECT)
    world.turn()
    world.compiled()
    world.assert_idle()
    world.submit("late", [1, 2], 60, grammar=OBJECT)
    world.assert_idle()
    assert world.compiler.num_compiled == 1


def test_resumed_request_goes_on_within_its_grammar(world: World) -> None:
    first = world.submit("r", [5, 6], 60, grammar=OBJECT)
    world.turn()
    world.compiled()
    world.assert_idle()
    emitted = first.token_ids[:9]
    again = world.submit("again", [5, 6, *emitted], 60, num_prompt_tokens=2, grammar=OBJECT)
    world.assert_idle()
    assert emitted + again.token_ids == first.token_ids


def test_retracted_request_goes_on_within_its_grammar(world: World) -> None:
    streams = [world.submit(f"r{index}", [index + 1] * 20, 90, grammar=OBJECT) for index in range(6)]
    world.turn()
    world.compiled()
    world.assert_idle()
    num_retractions = world.audit().counters["retractions"]
    assert num_retractions > 0
    for index, stream in enumerate(streams):
        alone = world.submit(f"alone{index}", [index + 1] * 20, 90, grammar=OBJECT)
        world.assert_idle()
        assert stream.token_ids == alone.token_ids and json.loads(text_of(stream.token_ids))
    assert world.audit().counters["retractions"] == num_retractions


def test_request_whose_tokens_leave_its_grammar_fails_alone(world: World) -> None:
    stray = world.submit("stray", [5, *tokens_of('{"no')], 60, num_prompt_tokens=1, grammar=OBJECT)
    good = world.submit("good", [5], 60, grammar=OBJECT)
    world.turn()
    world.compiled()
    world.assert_idle()
    assert stray.error is not None and stray.error.code == "grammar_violated"
    assert json.loads(text_of(good.token_ids))


def test_bad_grammar_fails_one_request(world: World) -> None:
    bad = world.submit("bad", [1], grammar=Grammar("regex", "(["))
    good = world.submit("good", [2], 5)
    world.turn()
    world.compiled()
    world.assert_idle()
    assert bad.error is not None and (bad.error.code, bad.error.http_status) == ("bad_grammar", 400)
    assert good.ended == "finished"


def test_broken_compiler_fails_one_order_retryably_and_is_made_anew() -> None:
    world = World(compiler=FailingCompiler())
    first = world.submit("first", [1], 9, grammar=Grammar("regex", "a"))
    second = world.submit("second", [1], 9, grammar=Grammar("regex", "b"))
    world.turn()
    world.compiled(2)
    world.assert_idle()
    assert first.error is not None and first.error.retryable
    assert first.error.code == "grammar_unavailable"
    assert text_of(second.token_ids) == "b"
    assert world.compiler.closed
    world.desk.close()


def test_orders_are_bounded_and_what_is_ordered_may_be_ordered_again() -> None:
    compiler = SlowCompiler()
    world = World(compiler=compiler)
    for index in range(MAX_ORDERED):
        assert world.desk.find_or_order(Grammar("regex", f"a{{{index + 1}}}"), lambda: False) is None
    refused = world.submit("refused", [1], 9, grammar=Grammar("regex", "b"))
    known = world.submit("known", [1], 9, grammar=Grammar("regex", "a{2}"))
    world.turn_until(lambda: refused.ended)
    assert refused.error is not None and refused.error.retryable
    assert refused.error.code == "grammar_queue_full"
    compiler.may_compile.set()
    world.compiled(MAX_ORDERED)
    world.assert_idle()
    assert text_of(known.token_ids) == "aa"
    world.desk.close()


def test_orders_that_nobody_waits_for_are_not_compiled() -> None:
    compiler = SlowCompiler()
    world = World(compiler=compiler)
    for name in ("a", "b", "c"):
        world.submit(name, [1], 9, grammar=Grammar("regex", name))
    also_c = world.submit("also c", [1], 9, grammar=Grammar("regex", "c"))
    world.turn()
    assert compiler.has_begun.wait(DEADLINE_S)
    for name in ("a", "b", "c"):
        world.turn(EngineAbort(name, 1))
    compiler.may_compile.set()
    world.compiled(2)
    world.assert_idle()
    assert compiler.compiled == ["a", "c"], "a was under way, and somebody waits for c"
    assert text_of(also_c.token_ids) == "c"
    again = world.submit("b again", [1], 9, grammar=Grammar("regex", "b"))
    world.turn()
    world.compiled()
    world.assert_idle()
    assert text_of(again.token_ids) == "b"
    world.desk.close()


def test_orders_that_nobody_waits_for_make_room_for_others() -> None:
    compiler = SlowCompiler()
    world = World(compiler=compiler)
    grammars = [Grammar("regex", f"a{{{index + 1}}}") for index in range(MAX_ORDERED)]
    gone = False
    for grammar in grammars:
        assert world.desk.find_or_order(grammar, lambda: gone) is None
    assert compiler.has_begun.wait(DEADLINE_S)
    assert not world.desk.takes(Grammar("regex", "b"))
    gone = True
    assert world.desk.takes(Grammar("regex", "b"))
    assert world.desk.takes(grammars[0])
    late = world.submit("late", [1], 9, grammar=grammars[1])
    world.turn()
    compiler.may_compile.set()
    world.compiled(2)
    world.assert_idle()
    assert compiler.compiled == ["a{1}", "a{2}"] and text_of(late.token_ids) == "aa"
    world.desk.close()


def test_request_that_no_token_can_follow_fails_without_one_more(world: World) -> None:
    stuck = world.submit("stuck", [5], 9, grammar=Grammar("ebnf", 'root ::= "ab" [\u4e00]'))
    good = world.submit("good", [5], 60, grammar=OBJECT)
    world.turn()
    world.compiled(2)
    world.assert_idle()
    assert text_of(stuck.token_ids) == "ab"
    assert stuck.error is not None
    assert (stuck.error.code, stuck.error.http_status) == ("grammar_dead_end", 400)
    assert json.loads(text_of(good.token_ids))


def test_too_long_a_grammar_is_refused_at_once(world: World) -> None:
    stream = world.submit("r", [1], grammar=Grammar("ebnf", "x" * (MAX_SOURCE_CHARS + 1)))
    world.turn_until(lambda: stream.ended)
    assert stream.error is not None and stream.error.code == "bad_grammar"
    assert world.compiler.num_compiled == 0


def test_engine_without_grammars_says_so() -> None:
    world = EngineWorld()
    stream = world.submit("r", [1], grammar=OBJECT)
    world.assert_idle()
    assert stream.error is not None and stream.error.code == "grammar_unavailable"


def test_request_aborted_while_its_grammar_compiles_ends_once() -> None:
    compiler = SlowCompiler()
    world = World(compiler=compiler)
    stream = world.submit("r", [1], grammar=OBJECT)
    world.turn()
    assert compiler.has_begun.wait(DEADLINE_S)
    world.turn(EngineAbort("r", 1))
    assert stream.ended == "aborted"
    compiler.may_compile.set()
    world.compiled()
    world.assert_idle()
    world.desk.close()


@pytest.mark.parametrize(("grammar", "ends"), [(OBJECT, True), (None, False)])
def test_end_tokens_end_an_answer_with_a_grammar(grammar: Grammar | None, ends: bool) -> None:
    """Behind the end of its grammar nothing is allowed."""
    submit = Submit(
        request_id="r",
        attempt=1,
        epoch=1,
        phase="both",
        token_ids=[1],
        num_prompt_tokens=1,
        sampling=SamplingParams(max_tokens=9, ignore_eos=True, grammar=grammar),
    )
    request = Request(submit, gateway=0, order=1, eos_token_ids=(EOS,), context_length=99, now_s=0.0)
    assert (EOS in request.stop_token_ids) == ends


def test_desk_closes_its_compiler() -> None:
    world = World()
    world.submit("r", [1], grammar=OBJECT)
    world.turn()
    world.desk.close()
    assert world.compiler.closed
