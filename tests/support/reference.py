"""What transformers generates: the oracle for greedy tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

MAX_TOKENS = 64
_STORY = (
    "Once upon a time there was a small town by the sea where the fishermen went out before the sun rose. "
    "Every evening they came back with their boats full, and the children ran down to the harbour to count "
    "the fish. One day a stranger arrived with a map that nobody could read, and he asked the oldest of the "
    "fishermen to take him to an island that was not on any chart. The old man laughed at first, but then he "
    "looked at the map for a long time and became quiet. "
)
_NOTES = (
    "Photosynthesis turns light into chemical energy. Plants take up water through their roots and carbon "
    "dioxide through their leaves. The sugar that they make travels through the phloem to wherever it is "
    "needed: to growing tips, to fruits, and to the roots. "
)
TEXTS = (
    "Hello",
    "The capital of France is",
    "def fibonacci(n):",
    "1, 2, 3, 4, 5, 6,",
    "Water boils at",
    "The three primary colours are red,",
    "Write a short poem about the moon.",
    '{"name": "Alice", "age": 30, "city":',
    "Q: What is the largest planet?\nA:",
    "In the beginning God created",
    "To make bread you need flour, water, salt and yeast. First,",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nList five animals.<|im_end|>\n<|im_start|>assistant\n",
    "SELECT name, COUNT(*) FROM orders WHERE",
    "The quick brown fox jumps over the lazy dog. " * 4,
    _NOTES,
    _STORY,
    _NOTES + "A good summary of this text is:",
    _STORY + _NOTES,
    _STORY + _NOTES + "Two questions to check that the reader understood both texts: " + _STORY,
)


class Expected(NamedTuple):
    """`gaps[i]`: by how much the logit of `token_ids[i]` exceeds the second best."""

    token_ids: list[int]
    gaps: list[float]


class Reference:
    """Loads the model, in float32 unless told otherwise; dropped when the expected tokens are known."""

    def __init__(self, model_dir: Path, dtype: torch.dtype = torch.float32) -> None:
        # Imported here: a host that has the reference's tokens need not wait for it. Any: it is not typed.
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()
        self._model.generation_config.eos_token_id = None

    def greedy(self, prompts: list[list[int]]) -> list[Expected]:
        """`MAX_TOKENS` greedy tokens of each prompt, end tokens ignored; one batch, padded on the left."""
        longest = max(len(prompt) for prompt in prompts)
        input_ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        with torch.inference_mode():
            made = self._model.generate(
                input_ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=MAX_TOKENS,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
        best = torch.stack([step.topk(2).values for step in made.logits])  # [step, row, 2]
        gaps = (best[..., 0] - best[..., 1]).T.tolist()
        tokens = made.sequences[:, longest:].tolist()
        return [Expected(*row) for row in zip(tokens, gaps, strict=True)]

    def forced_logits(self, prompt: list[int], token_ids: list[int]) -> torch.Tensor:
        """float32 `[len(token_ids), vocab]`: the logits that each of `token_ids` was to be chosen by."""
        with torch.inference_mode():
            logits: torch.Tensor = self._model(torch.tensor([prompt + token_ids[:-1]])).logits[0]
        return logits[len(prompt) - 1 :].float()


def encode_prompts(model_dir: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]


def assert_equal(found: list[int], expected: Expected, what: str) -> None:
    """Token by token; a difference is shown with how close the reference's own choice was."""
    for index, (token, wanted) in enumerate(zip(found, expected.token_ids, strict=False)):
        assert token == wanted, (
            f"{what}: token {index} is {token}, transformers has {wanted}, whose logit leads the second "
            f"best by {expected.gaps[index]:.2e}"
        )
    assert len(found) == len(expected.token_ids), what
