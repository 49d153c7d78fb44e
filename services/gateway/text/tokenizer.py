"""The model's tokenizer: text to token ids, as transformers does it."""

from __future__ import annotations

import secrets
import threading
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from phloem.services.gateway.text.control_tokens import ControlTokens, Shield
from phloem.services.gateway.text.model_files import TokenizerSettings
from phloem.shared.errors import ConfigError, invalid_request

_TOKENIZER_FILE = "tokenizer.json"


class Tokenizer:
    """Encodes prompts. Its methods block, release the interpreter lock, and may run on any thread."""

    def __init__(self, model_dir: Path, settings: TokenizerSettings) -> None:
        """Raises `ConfigError` when the directory has no tokenizer that can be loaded."""
        self._path = model_dir / _TOKENIZER_FILE
        self._settings = settings
        self.backend = _load(self._path, settings)
        added = self.backend.get_added_tokens_decoder()
        normalizer = self.backend.normalizer
        self.control_tokens = ControlTokens(
            {token_id: token for token_id, token in added.items() if token.special},
            normalizer.normalize_str if normalizer is not None else None,
        )
        self._sealed: SealedTokenizer | None = None
        self._sealed_lock = threading.Lock()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`; control tokens in it count as such. With `add_special_tokens` the tokenizer's
        own bos and eos are added, as for a raw prompt."""
        ids: list[int] = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def encode_rendered(self, rendered: str, shield: Shield) -> list[int]:
        """Token ids of what a chat template made of `shield`ed messages: the template's control tokens count,
        the messages' own stay text. No bos is added: the template has written it.

        Raises `PhloemError` (400) when a control token in a message can't be kept text.
        """
        if not shield.needed:
            return self.encode(rendered, add_special_tokens=False)
        return self._sealed_tokenizer().encode(rendered, shield)

    def _sealed_tokenizer(self) -> SealedTokenizer:
        # A second tokenizer costs tens of MiB: only who meets a control token in user text pays.
        with self._sealed_lock:
            if self._sealed is None:
                unk = self._settings.named_tokens().get("unk_token")
                backend = _load(self._path, self._settings)
                self._sealed = SealedTokenizer(backend, self.control_tokens, unk)
            return self._sealed


class SealedTokenizer:
    """Knows each control token only under a secret alias (see `control_tokens.py`); owns `backend`."""

    def __init__(self, backend: Backend, control_tokens: ControlTokens, unk_token: str | None) -> None:
        """`unk_token` is what unknown characters become, which is no control."""
        self._backend = backend
        self._control_tokens = control_tokens
        self._aliases = {content: f"qz{secrets.token_hex(16)}z" for content in control_tokens.contents}
        backend.encode_special_tokens = True
        backend.add_tokens([self._alias_token(content) for content in control_tokens.contents])
        self._true_ids = {
            _known_id(backend, alias): control_tokens.by_content[content][0]
            for content, alias in self._aliases.items()
        }
        self._forbidden = {
            token_id for content, (token_id, _) in control_tokens.by_content.items() if content != unk_token
        }

    def encode(self, rendered: str, shield: Shield) -> list[int]:
        """Token ids of a rendered conversation; the control tokens that `shield` hid in it stay text. Raises
        `PhloemError` (400, `control_token_in_text`) where the vocabulary leaves no way to do that."""
        sealed = self._control_tokens.replace(rendered, self._aliases.__getitem__)
        [encoding] = self._backend.encode_batch_fast([shield.reveal(sealed)], add_special_tokens=False)
        ids: list[int] = encoding.ids
        if not self._forbidden.isdisjoint(ids):
            # The model's own vocabulary spells a control token: there is no way to keep it text.
            raise invalid_request(
                "the messages hold a control token that this model's tokenizer can't take as text",
                param="messages",
                code="control_token_in_text",
            )
        true_ids = self._true_ids
        return [true_ids.get(token_id, token_id) for token_id in ids]

    def _alias_token(self, content: str) -> AddedToken:
        token = self._control_tokens.by_content[content][1]
        return AddedToken(
            self._aliases[content],
            single_word=token.single_word,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            normalized=False,
            special=False,
        )


def _known_id(backend: Backend, content: str) -> int:
    token_id = backend.token_to_id(content)
    assert token_id is not None
    return token_id


def _load(path: Path, settings: TokenizerSettings) -> Backend:
    if not path.is_file():
        raise ConfigError(
            f"{path.parent} has no {_TOKENIZER_FILE}: the gateway needs one (`phloem pull` makes it).",
            param="model_path",
        )
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{path} can't be loaded: {error}", param="model_path") from error
    # A file may carry the truncation of its training run, which would cut prompts in silence.
    backend.no_truncation()
    backend.no_padding()
    _apply_bos_eos_flags(backend, settings)
    return backend


def _apply_bos_eos_flags(backend: Backend, settings: TokenizerSettings) -> None:
    """The flags of `tokenizer_config.json`, where it has them, win over the tokenizer's own post-processor,
    as in transformers 5."""
    if settings.add_bos_token is None and settings.add_eos_token is None:
        return
    names = settings.named_tokens()
    bos = names.get("bos_token") if settings.add_bos_token else None
    eos = names.get("eos_token") if settings.add_eos_token else None
    tokens = [token for token in (bos, eos) if token is not None]
    ids = [(token, token_id) for token in tokens if (token_id := backend.token_to_id(token)) is not None]
    known = {token for token, _ in ids}
    pieces = [bos if bos in known else None, "$A", eos if eos in known else None]
    backend.post_processor = TemplateProcessing(
        single=[piece for piece in pieces if piece is not None], pair=None, special_tokens=ids
    )
