"""What an engine needs to follow grammars, made from its model; nothing starts before the first grammar."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from phloem.shared.engine.grammar.desk import Compiler, GrammarDesk, GrammarReady
from phloem.shared.engine.grammar.masks import MaskFiller


class GrammarParts(NamedTuple):
    desk: GrammarDesk
    masks: MaskFiller


class GrammarModel(NamedTuple):
    """model_dir holds `tokenizer.json`; vocab_size is that of the logits."""

    model_dir: Path
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    num_slots: int
    on_cuda: bool


def grammar_parts(model: GrammarModel, deliver: Callable[[GrammarReady], None]) -> GrammarParts | None:
    """None: xgrammar is not installed, or the model has no token that could end an answer."""
    if importlib.util.find_spec("xgrammar") is None or not model.eos_token_ids:
        return None

    def make_compiler() -> Compiler:
        # On the desk's thread: importing xgrammar takes a second.
        from phloem.shared.engine.grammar.process_compiler import CompilerSettings, ProcessCompiler

        return ProcessCompiler(CompilerSettings(model.model_dir, model.vocab_size, model.eos_token_ids))

    masks = MaskFiller(model.num_slots, model.vocab_size, pinned=model.on_cuda)
    return GrammarParts(GrammarDesk(make_compiler, deliver), masks)
