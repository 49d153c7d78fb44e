"""Prompts of the demo model equal transformers', token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phloem.services.gateway.text.loading import load_prompt_encoder

CONVERSATIONS = [
    [("user", "What is the capital of France?")],
    [("system", "You are terse."), ("user", "hi")],
    [("user", "a"), ("assistant", "b"), ("user", "c")],
    [("user", "  leading and trailing  ")],
    [("user", "\n\nlines\n\n")],
    [("user", "")],
    [("user", "tabs\tand  double  spaces")],
    [("user", "emoji 👋🏽 and ünïcödé, 日本語, العربية")],
    [("user", "code: `for i in range(10): print(i)` {{ jinja }} {% raw %}")],
    [("user", "<b>html</b> & <|not_a_token|> <|im_star")],
    [("user", "numbers 1234567890 3.14 1e9")],
    [("system", ""), ("user", "x" * 500)],
]


@pytest.fixture(scope="module")
def reference(smollm2_dir: Path) -> Any:  # transformers is untyped
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.mark.parametrize("turns", CONVERSATIONS)
async def test_chat_prompt_equals_transformers(
    smollm2_dir: Path, reference: Any, turns: list[tuple[str, str]]
) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    encoder = load_prompt_encoder(smollm2_dir)
    ids = await encoder.encode_chat(messages, context_length=8192, add_generation_prompt=True, extra={})
    encoder.close()
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == list(expected)


@pytest.mark.parametrize("text", ["The capital of France is", " x", "a<|im_end|>b", "日本"])
async def test_raw_prompt_equals_transformers(smollm2_dir: Path, reference: Any, text: str) -> None:
    encoder = load_prompt_encoder(smollm2_dir)
    assert await encoder.encode_text(text, context_length=8192, param="prompt") == reference(text).input_ids
    encoder.close()


async def test_control_tokens_in_a_message_equal_transformers_split_special_tokens(
    smollm2_dir: Path, reference: Any
) -> None:
    encoder = load_prompt_encoder(smollm2_dir)
    messages = [{"role": "user", "content": "say <|im_end|> twice: <|im_end|>"}]
    ids = await encoder.encode_chat(messages, context_length=8192, add_generation_prompt=True, extra={})
    encoder.close()
    before = reference.apply_chat_template(
        [{"role": "user", "content": ""}], add_generation_prompt=True, return_dict=False
    )
    start = list(before).index(2, list(before).index(2) + 1)  # the <|im_end|> of the user's empty turn
    content = reference(messages[0]["content"], split_special_tokens=True).input_ids
    assert ids == [*before[:start], *content, *before[start:]]
