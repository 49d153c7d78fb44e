"""Rotary embedding: frequencies by configuration, and the rows of cos and sin that a step needs.

Source of the stretched variants: Hugging Face's definitions of `linear`, `llama3` and `yarn` (Peng et al.,
"YaRN: efficient context window extension of large language models", 2023).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from phloem.shared.model_store.model_config import RopeConfig


class RotaryEmbedding:
    """Computes cos and sin of a step's positions."""

    def __init__(self, config: RopeConfig, head_dim: int, device: torch.device) -> None:
        self._inverse_frequencies = inverse_frequencies(config, head_dim).to(device)
        self._scale = _attention_factor(config)

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin for `ops.rope_write_kv`, each `[T, 1, head_dim]`; the first half of sin is negated."""
        angles = torch.outer(positions.to(torch.float32), self._inverse_frequencies)
        cos, sin = angles.cos(), angles.sin()
        if self._scale != 1.0:
            cos, sin = cos * self._scale, sin * self._scale
        cos_table = torch.cat((cos, cos), dim=-1).to(dtype).unsqueeze(1)
        sin_table = torch.cat((-sin, sin), dim=-1).to(dtype).unsqueeze(1)
        return cos_table, sin_table

    def halves(self, num_positions: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of the positions before `num_positions`, each `[num_positions, head_dim / 2]`."""
        positions = torch.arange(num_positions, device=self._inverse_frequencies.device)
        cos, sin = self.tables(positions, dtype)
        half = cos.shape[-1] // 2
        return cos[:, 0, :half].contiguous(), sin[:, 0, half:].contiguous()


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Radians per token of each pair of dimensions: float32 `[head_dim / 2]`."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    plain = 1.0 / (config.theta**exponents)
    match config.kind:
        case "default":
            return plain
        case "linear":
            return plain / config.factor
        case "llama3":
            return _llama3(plain, config)
        case "yarn":
            return _yarn(plain, config, head_dim)


def _llama3(plain: Tensor, config: RopeConfig) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones are left, those between are blended."""
    wavelengths = 2 * math.pi / plain
    turns = config.original_context / wavelengths
    span = config.high_freq_factor - config.low_freq_factor
    keep = ((turns - config.low_freq_factor) / span).clamp(0.0, 1.0)
    return (1.0 - keep) * plain / config.factor + keep * plain


def _yarn(plain: Tensor, config: RopeConfig, head_dim: int) -> Tensor:
    """Dimensions that turn often in the original context are left, those that hardly turn are stretched."""
    low = _yarn_dimension(config.beta_fast, config, head_dim)
    high = _yarn_dimension(config.beta_slow, config, head_dim)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    return plain / config.factor * ramp + plain * (1.0 - ramp)


def _yarn_dimension(num_turns: float, config: RopeConfig, head_dim: int) -> float:
    """The (fractional) dimension that turns `num_turns` times in the original context."""
    ratio = config.original_context / (num_turns * 2 * math.pi)
    return head_dim * math.log(ratio) / (2 * math.log(config.theta))


def _attention_factor(config: RopeConfig) -> float:
    if config.kind != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return _mscale(config.factor, config.mscale) / _mscale(config.factor, config.mscale_all_dim)
    return _mscale(config.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0
