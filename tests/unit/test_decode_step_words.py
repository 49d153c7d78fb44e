"""How blocks of `decode_step.cu` hand words to each other: a model, under random interleavings.

A store is seen late, and stores of a block in any order, but none after the block has told that a phase has
ended. Readers compare a tag only; whoever finds the tag of a later phase has lost what it waited for.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import TypeAlias

import pytest

LAYERS, LAUNCHES, PHASES = 3, 3, 3  # phases of a layer: qkv, attention, and one for all products after it
PATIENCE = 100_000  # turns in which nobody gets on
Place: TypeAlias = tuple[str, int]


class Lost(AssertionError):
    """What a block waits for was overwritten before it was read, or is older than it takes it for."""


class Stuck(AssertionError):
    """All wait, and no store is on its way."""


class Step:
    """Steps of some blocks. With `is_told` False nobody waits for the end of attention."""

    def __init__(self, seed: int, *, is_told: bool = True) -> None:
        self._random, self._is_told = random.Random(seed), is_told
        self._blocks = self._random.randint(2, 6)
        self._num_outputs = self._random.randint(self._blocks, 2 * self._blocks)  # words of qkv
        parts = [self._random.randint(1, 4) for _ in range(self._random.randint(1, 4))]  # by row
        self._items = [(part, count) for count in parts for part in range(count)]
        self._memory: dict[Place, int] = {}  # the tags that all see
        self._late: list[list[tuple[Place, int]]] = [[] for _ in range(self._blocks)]
        self._ended: Counter[int] = Counter()  # blocks, by phase, of all launches

    def run(self) -> None:
        for launch in range(1, LAUNCHES + 1):
            live = {block: self._block(block, launch) for block in range(self._blocks)}
            speed = [self._random.choice((1, 1, 5, 30)) for _ in live]
            idle = 0
            while live or any(self._late):
                block = self._random.choices(range(self._blocks), speed)[0]
                if self._late[block] and self._random.random() < 0.3:
                    self._let_one_be_seen(block)
                    idle = 0
                elif block in live:
                    gets_on = next(live[block], None)
                    if gets_on is None:
                        del live[block]
                    idle = idle + 1 if gets_on is False else 0
                if idle > PATIENCE:
                    raise Stuck

    def _let_one_be_seen(self, block: int) -> None:
        late = self._late[block]
        place, tag = late.pop(self._random.randrange(len(late)))
        self._memory[place] = tag

    def _block(self, block: int, launch: int) -> Iterator[bool]:
        """What a block does in a launch; yields whether it gets on."""
        mine = range(block, len(self._items), self._blocks)
        for layer in range(LAYERS):
            first = PHASES * layer
            tag = launch * PHASES * LAYERS + first
            for output in range(block, self._num_outputs, self._blocks):
                yield self._publish(block, ("output", output), tag)
            for item in mine:
                for output in self._random.sample(range(self._num_outputs), self._num_outputs):
                    yield from self._look(("output", output), tag)
                kind = "part" if self._items[item][1] > 1 else "attended"
                yield self._publish(block, (kind, item), tag + 1)
            for item in mine:
                part, count = self._items[item]
                if count > 1:
                    for other in range(item - part, item - part + count):
                        yield from self._look(("part", other), tag + 1)
                    yield self._publish(block, ("attended", item), tag + 1)
            if self._is_told:
                yield from self._meet(block, launch, first + 1)
                if any(self._memory[("attended", item)] != tag + 1 for item in range(len(self._items))):
                    raise Lost
                yield from self._meet(block, launch, first + 2)

    def _publish(self, block: int, place: Place, tag: int) -> bool:
        self._late[block].append((place, tag))
        return True

    def _look(self, place: Place, tag: int) -> Iterator[bool]:
        while (seen := self._memory.get(place, 0)) != tag:
            if seen > tag:
                raise Lost
            yield False
        yield True

    def _meet(self, block: int, launch: int, phase: int) -> Iterator[bool]:
        while self._late[block]:  # a release
            yield False
        self._ended[phase] += 1
        yield True
        while self._ended[phase] < launch * self._blocks:
            yield False
        yield True


@pytest.mark.parametrize("seed", range(60))
def test_words_are_read_before_they_are_written_again_and_nobody_waits_forever(seed: int) -> None:
    Step(seed).run()


def test_model_sees_words_that_are_lost() -> None:
    """Where blocks go on to the next layer before all have attended."""
    found = set()
    for seed in range(20):
        try:
            Step(seed, is_told=False).run()
        except (Lost, Stuck) as error:
            found.add(type(error))
    assert Lost in found
