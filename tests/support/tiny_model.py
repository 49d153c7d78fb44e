"""A decoder of a few thousand random weights: quick, and every earlier token changes what it makes."""

from __future__ import annotations

import torch

from phloem.shared.engine.models.decoder import Decoder
from phloem.shared.engine.models.parameters import ParameterFactory
from phloem.shared.engine.models.registry import find_architecture
from phloem.shared.engine.weights.slots import weight_slots
from phloem.shared.model_store.model_config import parse_model_config

VOCAB = 199
CONTEXT = 512
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
}


def tiny_decoder() -> Decoder:
    """float32 on the CPU, the same weights each time."""
    config = parse_model_config(_CONFIG, {})
    parameters = ParameterFactory(config, torch.float32, torch.device("cpu")).make()
    generator = torch.Generator().manual_seed(11)
    for slot in weight_slots(parameters, find_architecture(config).names, config).values():
        slot.normal_(1.0 if slot.dim() == 1 else 0.0, 0.15, generator=generator)
    return Decoder(config, parameters)


def random_prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(1, VOCAB, (length,), generator=generator)]
