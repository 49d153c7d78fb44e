"""`phloem chat`: a conversation with a running cluster."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from typing import Annotated

from cyclopts import Parameter

from phloem.cli.chat_client import UNREACHABLE, ChatClient
from phloem.shared.errors import PhloemError, unavailable

DEFAULT_URL = "http://127.0.0.1:30000"
HELP = "/reset starts anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def chat(
    *,
    url: Annotated[str, Parameter(help="a gateway")] = DEFAULT_URL,
    model: Annotated[str | None, Parameter(help="model to ask; the first one served when not given")] = None,
    system: Annotated[str | None, Parameter(help="system message")] = None,
    temperature: Annotated[float, Parameter(help="0: always the most likely token")] = 0.7,
    max_tokens: Annotated[int, Parameter(help="longest answer")] = 512,
    api_key: Annotated[str, Parameter(env_var="PHLOEM_GATEWAY_API_KEY", help="if the gateway asks")] = "",
) -> int:
    """Talk to a running cluster; answers stream. Exits with 1 when the last question got no answer."""
    client = ChatClient(url, api_key=api_key.split(",")[0])
    name = choose_model(_served(client), model, url)
    print(f"{name} at {url}. {HELP}.", flush=True)
    conversation = Conversation(
        lambda messages: client.stream(name, messages, temperature=temperature, max_tokens=max_tokens), system
    )
    with contextlib.suppress(ImportError):  # not every Python was built with it
        import readline  # noqa: F401 - gives `input` line editing and a history
    answered = True
    with contextlib.suppress(EOFError):
        while (line := _prompt()) != "/exit":
            if line == "/reset":
                conversation.reset()
            elif line:
                answered = conversation.turn(line)
    return 0 if answered else 1


class Conversation:
    """The messages so far; an answer that failed or was stopped leaves no half turn that would confuse."""

    def __init__(
        self, answer: Callable[[list[dict[str, str]]], Iterable[str]], system: str | None = None
    ) -> None:
        self._answer = answer
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._system)

    def reset(self) -> None:
        self.messages = list(self._system)

    def turn(self, line: str) -> bool:
        """Asks, prints the answer as it comes, and keeps both; Ctrl-C keeps the part that was seen.
        False when it failed; the error is on stderr then."""
        question = {"role": "user", "content": line}
        pieces: list[str] = []
        try:
            for piece in self._answer([*self.messages, question]):
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except PhloemError as error:
            print(f"\nphloem: error: {error}", file=sys.stderr)
            return False
        print(flush=True)
        if pieces:
            self.messages += [question, {"role": "assistant", "content": "".join(pieces)}]
        return True


def choose_model(served: list[str], wanted: str | None, url: str) -> str:
    """The model to ask: `wanted`, else the first of `served`. Raises `PhloemError` when it is not there."""
    if not served:
        raise PhloemError("no_model", f"{url} serves no model yet: are its workers up?")
    if wanted is not None and wanted not in served:
        raise PhloemError("no_model", f"{url} does not serve --model {wanted}, but {', '.join(served)}")
    return wanted or served[0]


def _served(client: ChatClient) -> list[str]:
    try:
        return client.models()
    except PhloemError as error:
        if error.code != UNREACHABLE:
            raise
        hint = "start a cluster with `phloem up`, or name its gateway with --url"
        raise unavailable(f"{error}: {hint}", code=UNREACHABLE) from error


def _prompt() -> str:
    """The next line, stripped. Raises `EOFError`; Ctrl-C at the prompt leaves as Ctrl-D does."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except KeyboardInterrupt:
        raise EOFError from None
