"""The small files of a model directory that turn text into tokens: read once, bounded, never executed."""

from __future__ import annotations

from pathlib import Path

import msgspec

from phloem.shared.errors import ConfigError

MAX_FILE_BYTES = 256 * 1024 * 1024
MAX_TEMPLATE_BYTES = 1024 * 1024


class NamedTemplate(msgspec.Struct, frozen=True):
    name: str
    template: str


class AddedTokenEntry(msgspec.Struct, frozen=True):
    content: str


class TokenizerSettings(msgspec.Struct, frozen=True):
    """What the gateway uses of `tokenizer_config.json`; flags that are None were not in it."""

    chat_template: str | list[NamedTemplate] | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    bos_token: str | AddedTokenEntry | None = None
    eos_token: str | AddedTokenEntry | None = None
    unk_token: str | AddedTokenEntry | None = None
    sep_token: str | AddedTokenEntry | None = None
    pad_token: str | AddedTokenEntry | None = None
    cls_token: str | AddedTokenEntry | None = None
    mask_token: str | AddedTokenEntry | None = None

    def named_tokens(self) -> dict[str, str]:
        """The tokens that have a role, by the name under which chat templates know them."""
        roles = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
        found = {role: getattr(self, role) for role in roles}
        return {
            role: token.content if isinstance(token, AddedTokenEntry) else token
            for role, token in found.items()
            if token is not None
        }


def read_tokenizer_settings(model_dir: Path) -> TokenizerSettings:
    """`tokenizer_config.json`, all defaults when there is none. Raises `ConfigError` when it is malformed."""
    path = model_dir / "tokenizer_config.json"
    if not path.is_file():
        return TokenizerSettings()
    try:
        return msgspec.json.decode(read_bounded(path, MAX_FILE_BYTES), type=TokenizerSettings)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is malformed: {error}", param="model_path") from error


def find_chat_template(model_dir: Path, settings: TokenizerSettings, override: str) -> str | None:
    """The source of the chat template, None when the model has none.

    `override` is the operator's file; then come `chat_template.jinja` and `tokenizer_config.json`, as in
    transformers. Raises `ConfigError` when a file can't be read.
    """
    if override:
        return _read_template(Path(override), "chat_template")
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        return _read_template(path, "model_path")
    if isinstance(settings.chat_template, list):
        named = {entry.name: entry.template for entry in settings.chat_template}
        return named.get("default")
    return settings.chat_template


def _read_template(path: Path, param: str) -> str:
    try:
        return read_bounded(path, MAX_TEMPLATE_BYTES).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"the chat template {path} is not UTF-8 text", param=param) from error


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The file's bytes. Raises `ConfigError` when it can't be read or is longer than `max_bytes`."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}", param="model_path") from error
    if len(data) > max_bytes:
        raise ConfigError(f"{path} is longer than {max_bytes} bytes", param="model_path")
    return data
