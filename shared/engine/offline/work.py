"""What `phloem bench offline` measures, as values. Pure, without torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

from msgspec import Meta, Struct

from phloem.shared.protocol.session import Grammar, SamplingParams

SAMPLED_BATCH = 64  # the batch whose idle device has a bar, greedy and sampled
_STAGGER_TOKENS = 8
_PREFILL_TOKENS_PER_STEP = 4096  # no more than that is counted on while a batch gathers


class StepSampling(Struct, frozen=True, kw_only=True):
    """How the tokens of decode steps are chosen; the same ranges as a request's."""

    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] = 0.0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=1 << 31)] = 0
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0

    def __post_init__(self) -> None:
        """Refuses filters that filter nothing."""
        if not self.temperature and (self.top_p, self.top_k, self.min_p) != (1.0, 0, 0.0):
            raise ValueError(
                "--top-p, --top-k and --min-p do nothing at --temperature 0, which is greedy: "
                "give --temperature 1 with them"
            )

    def params(self, max_tokens: int, seed: int, grammar: Grammar | None) -> SamplingParams:
        """Of a request that no end token ends."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=seed,
            ignore_eos=True,
            grammar=grammar,
        )


GREEDY = StepSampling()
SAMPLED = StepSampling(temperature=1.0, top_p=0.95)  # of the row that `--sampled` adds


class DecodeRun(NamedTuple):
    """One row of the instrument; `kind` is what `bars.py` knows it by."""

    kind: Literal["decode", "decode, grammars", "decode, sampled"]
    batch: int
    context: int
    num_steps: int
    sampling: StepSampling
    grammar_share: float = 0.0


class OfflineWork(Struct, frozen=True, kw_only=True):
    """`prefill`: prompt lengths in tokens. `decode`: (batch, context in tokens), each for `steps` steps; with
    a `grammar_share` each a second time, with a grammar on that share of the rows. `sampled`: the largest of
    batch `SAMPLED_BATCH` once more, sampled as `SAMPLED` says."""

    prefill: tuple[Annotated[int, Meta(ge=1)], ...]
    decode: tuple[tuple[Annotated[int, Meta(ge=1)], Annotated[int, Meta(ge=1)]], ...]
    steps: Annotated[int, Meta(ge=1, le=1_000_000)] = 64
    sampling: StepSampling = GREEDY
    sampled: bool = False
    grammar_share: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0

    def __post_init__(self) -> None:
        if self.sampled and self.sampled_shape is None:
            raise ValueError(
                f"--sampled measures a batch of {SAMPLED_BATCH}, and --decode has none: add one, as "
                f"{SAMPLED_BATCH}x1024 is"
            )

    @property
    def sampled_shape(self) -> tuple[int, int] | None:
        """The shape that is measured sampled as well, None for none."""
        shapes = [shape for shape in self.decode if shape[0] == SAMPLED_BATCH]
        return max(shapes, default=None) if self.sampled else None

    @property
    def decode_runs(self) -> Iterator[DecodeRun]:
        """In the order of the shapes; what is measured of one shape stands together."""
        for batch, context in self.decode:
            plain = DecodeRun("decode", batch, context, self.steps, self.sampling)
            yield plain
            if self.grammar_share:
                yield plain._replace(kind="decode, grammars", grammar_share=self.grammar_share)
            if (batch, context) == self.sampled_shape:
                yield plain._replace(kind="decode, sampled", sampling=SAMPLED)


class DecodePlan(NamedTuple):
    """How a decode shape is reached: early prompts decode while later ones prefill, so requests start with
    less than `context` and are given so many tokens more. `chunk_tokens`: most tokens of an engine step."""

    batch: int
    context: int
    num_steps: int
    chunk_tokens: int

    @property
    def lead(self) -> int:
        """Steps for the batch to gather."""
        return 8 + self.batch * self.context // min(_PREFILL_TOKENS_PER_STEP, self.chunk_tokens)

    @property
    def prompt_tokens(self) -> int:
        return max(1, self.context - self.lead - self.num_steps // 2)

    @property
    def new_tokens(self) -> int:
        return self.num_steps + self.lead

    @property
    def prompts(self) -> list[int]:
        """Each request's, in tokens."""
        return [staggered_tokens(self.prompt_tokens, index) for index in range(self.batch)]

    @property
    def longest(self) -> int:
        """Tokens of the longest request at its end."""
        return max(self.prompts) + self.new_tokens


def staggered_tokens(prompt_tokens: int, index: int) -> int:
    """Prompts are up to 8 tokens shorter or longer, so that rows need pages in different steps, as in
    service."""
    return max(1, prompt_tokens + index % (2 * _STAGGER_TOKENS + 1) - _STAGGER_TOKENS)
