"""The streaming chat client against a real HTTP server, and the conversation it keeps."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from phloem.cli.chat import Conversation, choose_model
from phloem.cli.chat_client import ChatClient
from phloem.cli.main import run
from phloem.shared.errors import PhloemError

DEADLINE_S = 20.0


class Script:
    """What the server answers to the next POST, and what it was asked."""

    status = 200
    body = b""
    asked: ClassVar[list[dict[str, object]]] = []


@pytest.fixture
def server() -> Iterator[tuple[str, Script]]:
    script = Script()
    script.asked.clear()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self._send(200, json.dumps({"data": [{"id": "m1"}]}).encode())

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            script.asked.append({"authorization": self.headers["authorization"], **json.loads(body)})
            self._send(script.status, script.body)

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}", script
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def events(*deltas: str, done: bool = True) -> bytes:
    chunks = [{"choices": [{"delta": {"content": delta}}]} for delta in deltas]
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join([*lines, *(["data: [DONE]\n\n"] if done else [])]).encode()


def test_pieces_arrive_in_order(server: tuple[str, Script]) -> None:
    url, script = server
    script.body = events("Pa", "", "ris")
    client = ChatClient(url + "/", api_key="k")
    messages = [{"role": "user", "content": "hi"}]
    assert list(client.stream("m1", messages, temperature=0)) == ["Pa", "ris"]
    assert script.asked == [
        {"authorization": "Bearer k", "model": "m1", "messages": messages, "stream": True, "temperature": 0}
    ]
    assert client.models() == ["m1"]


def test_error_answer_is_raised_with_its_code(server: tuple[str, Script]) -> None:
    url, script = server
    script.status = 503
    script.body = b'{"error": {"message": "no worker", "type": "server_error", "code": "no_workers"}}'
    with pytest.raises(PhloemError, match="no worker") as caught:
        list(ChatClient(url).stream("m1", []))
    assert (caught.value.code, caught.value.retryable) == ("no_workers", True)


def test_error_event_in_the_stream_is_raised(server: tuple[str, Script]) -> None:
    url, script = server
    script.body = (
        events("Pa", done=False) + b'data: {"error": {"message": "worker died", "code": "lost"}}\n\n'
    )
    stream = ChatClient(url).stream("m1", [])
    assert next(stream) == "Pa"
    with pytest.raises(PhloemError, match="worker died"):
        next(stream)


def test_stream_that_ends_early_is_an_error(server: tuple[str, Script]) -> None:
    url, script = server
    script.body = events("Pa", done=False)
    with pytest.raises(PhloemError, match="ended without"):
        list(ChatClient(url).stream("m1", []))


def test_unreachable_server_is_retryable_and_not_healthy() -> None:
    client = ChatClient("http://127.0.0.1:1")
    assert not client.is_healthy()
    with pytest.raises(PhloemError) as caught:
        client.models()
    assert (caught.value.code, caught.value.retryable) == ("gateway_unreachable", True)


def test_server_that_stops_in_the_middle_of_its_answer_is_unreachable_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = ChatClient(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.2)
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(client.models)
            accepted, _ = listener.accept()
            with accepted:
                accepted.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")
                with pytest.raises(PhloemError) as caught:
                    asking.result(DEADLINE_S)
    assert (caught.value.code, caught.value.retryable) == ("gateway_unreachable", True)


@pytest.mark.parametrize("url", ["127.0.0.1:30000", "ftp://host", "http://"])
def test_url_must_be_http(url: str) -> None:
    with pytest.raises(PhloemError, match="not an http"):
        ChatClient(url)


def test_conversation_keeps_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[list[dict[str, str]]] = []

    def answer(messages: list[dict[str, str]]) -> Iterable[str]:
        seen.append(messages)
        return ["a", f"{len(seen)}"]

    conversation = Conversation(answer, "be brief")
    conversation.turn("one")
    assert conversation.turn("two")
    assert [message["content"] for message in seen[1]] == ["be brief", "one", "a1", "two"]
    assert capsys.readouterr().out == "a1\na2\n"
    conversation.reset()
    assert [message["content"] for message in conversation.messages] == ["be brief"]


def test_failed_turn_leaves_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(messages: list[dict[str, str]]) -> Iterable[str]:
        yield "half"
        raise PhloemError("lost", "worker died")

    conversation = Conversation(answer)
    assert not conversation.turn("one")
    assert conversation.messages == []
    assert "worker died" in capsys.readouterr().err


def test_the_first_model_is_asked_unless_one_is_named() -> None:
    assert choose_model(["a", "b"], None, "http://x") == "a"
    assert choose_model(["a", "b"], "b", "http://x") == "b"


def test_a_model_that_is_not_served_is_refused_before_the_first_question() -> None:
    with pytest.raises(PhloemError, match="http://x does not serve --model c, but a, b"):
        choose_model(["a", "b"], "c", "http://x")
    with pytest.raises(PhloemError, match="are its workers up"):
        choose_model([], None, "http://x")


def test_chat_without_a_cluster_names_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", "--url", "http://127.0.0.1:1", "--model", "m1"]) == 1
    assert "start a cluster with `phloem up`, or name its gateway with --url" in capsys.readouterr().err


def test_chat_exits_with_1_when_the_last_question_failed(
    server: tuple[str, Script], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url, script = server
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    script.status = 503
    script.body = b'{"error": {"message": "no worker", "code": "no_workers"}}'
    assert run(["chat", "--url", url]) == 1
    assert "no worker" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    script.status, script.body = 200, events("Paris")
    assert run(["chat", "--url", url]) == 0


def test_earlier_questions_come_back_with_the_arrow_keys(server: tuple[str, Script]) -> None:
    url, script = server
    script.body = events("Paris")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "phloem.cli.main", "chat", "--url", url]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True) as child:
        os.close(theirs)
        try:
            for line, num_asked in ((b"capital?\n", 1), (b"\x1b[A\n", 2)):
                os.write(ours, line)
                _read_until(ours, lambda wanted=num_asked: len(script.asked) == wanted)  # type: ignore[misc]
            os.write(ours, b"/exit\n")
            assert child.wait(DEADLINE_S) == 0
        finally:
            child.kill()
            os.close(ours)
    questions = [asked["messages"][-1]["content"] for asked in script.asked]  # type: ignore[index]
    assert questions == ["capital?", "capital?"]


def _read_until(terminal: int, done: Callable[[], bool]) -> None:
    """Reads what the child writes, so that it never waits for a full terminal."""
    give_up_at = time.monotonic() + DEADLINE_S
    while not done():
        assert time.monotonic() < give_up_at
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 4096)
