"""Everything textual of one model directory, ready to use."""

from __future__ import annotations

from pathlib import Path

from phloem.services.gateway.text.chat_template import ChatTemplate
from phloem.services.gateway.text.model_files import find_chat_template, read_tokenizer_settings
from phloem.services.gateway.text.prompt_encoder import PromptEncoder
from phloem.services.gateway.text.tokenizer import Tokenizer


def load_prompt_encoder(
    model_dir: Path, *, chat_template: str = "", template_timeout_s: float = 2.0, num_threads: int = 2
) -> PromptEncoder:
    """Reads tokenizer and chat template; `chat_template` is a file that replaces the model's.

    Raises `ConfigError` that names the file at fault.
    """
    settings = read_tokenizer_settings(model_dir)
    source = find_chat_template(model_dir, settings, chat_template)
    template = (
        ChatTemplate(source, settings.named_tokens(), timeout_s=template_timeout_s)
        if source is not None
        else None
    )
    return PromptEncoder(Tokenizer(model_dir, settings), template, num_threads=num_threads)
