"""Turns a GGUF into a Hugging Face directory: `python -m phloem.shared.engine.weights.gguf_convert SRC DST`.

Writes bfloat16 safetensors, config.json, generation_config.json, tokenizer.json and the chat template.
Standard output carries one `ConversionEvent` as JSON per line. DST appears only when it is complete.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import msgspec

from phloem.shared.errors import PhloemError
from phloem.shared.lifecycle.exec_child import die_with_parent
from phloem.shared.model_store.conversion import ConversionEvent, ConversionFailed, ConversionProgress
from phloem.shared.model_store.files import is_gguf

NUM_STAGES = 4
_DIRECTORY_MODE = 0o755
_FILE_MODE = 0o644


def main(arguments: list[str]) -> int:
    """Converts; the exit status is 0 or 1, and 1 comes with a `ConversionFailed` line."""
    source, target = (Path(argument) for argument in arguments)
    die_with_parent(os.getppid(), signal.SIGKILL)
    try:
        # Standard output is ours alone: what a library prints goes to standard error.
        with contextlib.redirect_stdout(sys.stderr):
            convert(source, target)
    except PhloemError as error:
        _emit(ConversionFailed(error.info))
        return 1
    return 0


def convert(source: Path, target: Path) -> None:
    """Makes `target` from `source`; when another process was faster, its result stays.

    Raises PhloemError `not_a_model` or `conversion_failed`.
    """
    if not is_gguf(source):
        raise PhloemError("not_a_model", f"{source} does not begin like a GGUF file", param="model_path")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        _write(source, scratch)
        _make_readable(scratch)
        if not target.exists():
            os.rename(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(source: Path, directory: Path) -> None:
    _stage("importing", 0)
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, logging
    except ImportError as error:
        message = f"converting a GGUF needs the engine's packages ({error}); install phloem[engine]"
        raise PhloemError("conversion_failed", message) from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder, name = str(source.parent), source.name
    try:
        _stage("dequantising", 1)
        # transformers keeps the weights packed in memory; saving unpacks them into this dtype.
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)
        # Both would be saved, and claim that the dequantised weights are still quantised.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        _stage("writing weights", 2)
        model.save_pretrained(directory)
        _stage("writing tokenizer", 3)
        AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(directory)
        _stage("done", NUM_STAGES)
    except (ValueError, KeyError, NotImplementedError, OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise PhloemError("conversion_failed", f"{source} could not be converted: {reason}") from error


def _make_readable(directory: Path) -> None:
    """Temporary directories and safetensors are private by default; the cache may be shared."""
    directory.chmod(_DIRECTORY_MODE)
    for path in directory.iterdir():
        path.chmod(_FILE_MODE)


def _stage(name: str, done: int) -> None:
    _emit(ConversionProgress(name, done, NUM_STAGES))


def _emit(event: ConversionEvent) -> None:
    assert sys.__stdout__ is not None
    print(msgspec.json.encode(event).decode(), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
