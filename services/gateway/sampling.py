"""The sampling fields of a request, checked.

Ranges: temperature 0 to 2, as OpenAI documents it (below 1e-5 it is greedy: the division would overflow);
top_p above 0 to 1; top_k -1 or 0 (off), or at least 1; min_p 0 to 1; seed a signed 64-bit number.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol

from msgspec import Struct

from phloem.services.gateway.config import GatewayConfig
from phloem.services.gateway.grammar import AskedGrammar, GrammarFields, plan_grammar
from phloem.shared.errors import PhloemError, invalid_request
from phloem.shared.protocol.session import SamplingParams

MAX_TEMPERATURE = 2.0
_GREEDY_BELOW = 1e-5
_SEED_MIN, _SEED_MAX = -(1 << 63), (1 << 63) - 1


class SamplingFields(GrammarFields, kw_only=True, frozen=True):
    """What every API takes, by the same names; null is as good as absent."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None


class SamplingPlan(Struct, kw_only=True, frozen=True):
    """Checked sampling fields; `max_tokens` None: what fits. `seed` is drawn when the request had none."""

    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    n: int
    stops: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    skip_special_tokens: bool
    grammar: AskedGrammar | None = None

    def params(self, choice: int, max_tokens: int) -> SamplingParams:
        """For the `choice`-th of `n`: choice 0 has the request's own seed, each other one derived from it."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=derived_seed(self.seed, choice),
            ignore_eos=self.ignore_eos,
            stop_token_ids=self.stop_token_ids,
            grammar=self.grammar.grammar if self.grammar is not None else None,
        )

    def naming_field(self, error: PhloemError) -> PhloemError:
        """`error` of a worker, with the field that it is about where that can be told from here."""
        return error if self.grammar is None else self.grammar.naming_field(error)


class TokenCheck(Protocol):
    def __call__(self, token_ids: Sequence[int], param: str) -> None: ...


def derived_seed(seed: int, choice: int) -> int:
    """`seed` for choice 0, else a signed 64-bit hash of both."""
    if choice == 0:
        return seed
    words = seed.to_bytes(8, "little", signed=True) + choice.to_bytes(8, "little")
    return int.from_bytes(
        blake2b(words, digest_size=8, person=b"phloem-seed").digest(), "little", signed=True
    )


def plan_sampling(
    fields: SamplingFields,
    *,
    max_tokens: int | None,
    max_tokens_param: str,
    config: GatewayConfig,
    check_tokens: TokenCheck,
    prefix: str = "",
) -> SamplingPlan:
    """Checks the fields. Raises `PhloemError` (400) that names the field, `prefix` before its name.

    `check_tokens` raises when a token id is out of the vocabulary.
    """
    if max_tokens is not None and max_tokens < 1:
        raise _out_of_range(max_tokens_param, max_tokens, "at least 1")
    temperature = _within(fields.temperature, 1.0, 0.0, MAX_TEMPERATURE, prefix + "temperature")
    stop_token_ids = tuple(fields.stop_token_ids or ())
    _check_count(len(stop_token_ids), config.max_stop_token_ids, prefix + "stop_token_ids", "entries")
    check_tokens(stop_token_ids, prefix + "stop_token_ids")
    return SamplingPlan(
        max_tokens=max_tokens,
        temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
        top_p=_top_p(fields.top_p, prefix + "top_p"),
        top_k=_top_k(fields.top_k, prefix + "top_k"),
        min_p=_within(fields.min_p, 0.0, 0.0, 1.0, prefix + "min_p"),
        seed=_seed(fields.seed, prefix + "seed"),
        n=_choices(fields.n, config.max_n, prefix + "n"),
        stops=_stops(fields.stop, config, prefix + "stop"),
        stop_token_ids=stop_token_ids,
        ignore_eos=bool(fields.ignore_eos),
        skip_special_tokens=fields.skip_special_tokens is not False,
        grammar=plan_grammar(fields, prefix),
    )


def _within(value: float | None, default: float, low: float, high: float, param: str) -> float:
    if value is None:
        return default
    if not low <= value <= high:  # NaN fails this too
        raise _out_of_range(param, value, f"from {low:g} to {high:g}")
    return value


def _top_p(value: float | None, param: str) -> float:
    if value is not None and not 0.0 < value <= 1.0:
        raise _out_of_range(param, value, "above 0, at most 1")
    return 1.0 if value is None else value


def _top_k(value: int | None, param: str) -> int:
    if value is None or value in (-1, 0):
        return 0
    if not 1 <= value <= 1 << 31:
        raise _out_of_range(param, value, "at least 1, or -1 or 0 for off")
    return value


def _seed(value: int | None, param: str) -> int:
    if value is None:
        return secrets.randbits(63)
    if not _SEED_MIN <= value <= _SEED_MAX:
        raise _out_of_range(param, value, "a signed 64-bit integer")
    return value


def _choices(value: int | None, most: int, param: str) -> int:
    if value is None:
        return 1
    if not 1 <= value <= most:
        raise _out_of_range(param, value, f"from 1 to {most}")
    return value


def _stops(value: str | list[str] | None, config: GatewayConfig, param: str) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    _check_count(len(stops), config.max_stop_strings, param, "stop strings")
    for position, stop in enumerate(stops):
        if len(stop) > config.max_stop_chars:
            where = param if isinstance(value, str) else f"{param}[{position}]"
            raise invalid_request(
                f"{where} has {len(stop)} characters: at most {config.max_stop_chars}", param=where
            )
    return tuple(stop for stop in stops if stop)


def _check_count(count: int, most: int, param: str, noun: str) -> None:
    if count > most:
        raise invalid_request(f"{param} has {count} {noun}: at most {most}", param=param)


def _out_of_range(param: str, value: float, allowed: str) -> PhloemError:
    return invalid_request(f"{param} is {value}: it must be {allowed}", param=param)
