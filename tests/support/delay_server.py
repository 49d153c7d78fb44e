"""An OpenAI-compatible server with known delays, and a log of when it really wrote each token.

    python -m tests.support.delay_server [--port 0] [--many]

Prints its port. What a request shall experience is in the member `delay` of its own body (`Delay`), so that
one process serves every scenario. GET /log tells, by x-request-id, when requests came in and tokens went
out, on the machine's monotonic clock: a test on a busy machine compares with that instead of the intention.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast

import httptools
import msgspec
import uvloop

from phloem.shared.bench.client.lag import ask_for_priority


class Delay(msgspec.Struct, frozen=True):
    """`ttft_ms` to the first token, then `itl_ms` between chunks; with `tail` > 0 gaps are `itl_ms` times a
    Pareto variate of that shape (drawn from `seed` and the request's id). With `in_step` tokens go out on
    multiples of `itl_ms`, for all streams at once."""

    ttft_ms: float = 50.0
    itl_ms: float = 10.0
    tail: float = 0.0
    seed: int = 0
    tokens_per_chunk: int = 1
    in_step: bool = False
    slow_every: int = 0  # every n-th gap is ten times as long
    fail: Literal["", "status", "cut", "error_event", "hang", "empty"] = ""
    fail_every: int = 0  # each n-th session of the measured blocks fails (not the probe); 0: every request
    counts: bool = True  # continuous usage when asked for
    cached_tokens: int = 0
    token_ids: bool = False
    refuses: tuple[str, ...] = ()  # members whose name in the body makes it a bad request
    usage: bool = True


class _StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class _Sampling(msgspec.Struct, frozen=True):
    max_new_tokens: int = 16


class _Request(msgspec.Struct):
    prompt: list[int] | str = ""
    input_ids: list[int] = []
    text: str = ""
    messages: list[dict[str, str]] = []
    max_tokens: int = 16
    sampling_params: _Sampling = _Sampling()
    stream_options: _StreamOptions = _StreamOptions()
    delay: Delay = Delay()


class Entry(msgspec.Struct):
    """One request in the log, in seconds of the monotonic clock."""

    received_s: float
    path: str
    prompt: list[int] | str
    writes_s: list[float] = []


class Connection(asyncio.Protocol):
    """Answers one request after the other."""

    def __init__(self, log: dict[str, Entry]) -> None:
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._reset()

    def _reset(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""
        self._url = b""
        self._request_id = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-request-id":
            self._request_id = value.decode()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        received_s = time.monotonic()
        url, body, request_id = self._url.decode(), self._body, self._request_id
        self._reset()
        if url == "/v1/models":
            self._json(200, b'{"object":"list","data":[{"id":"delay-model","object":"model"}]}')
        elif url == "/log":
            self._json(200, msgspec.json.encode(self._log))
        elif url == "/flush_cache":
            self._log["flush"] = Entry(received_s, url, "")
            self._json(200, b"{}")
        elif not url.endswith(("/completions", "/generate")):
            self._json(404, b'{"detail":"Not Found"}')
        else:
            self._answer(url, body, request_id, received_s)

    def _json(self, status: int, body: bytes) -> None:
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self._transport.write(head.encode() + body)

    def _answer(self, url: str, body: bytes, request_id: str, received_s: float) -> None:
        request = msgspec.json.decode(body, type=_Request)
        prompt = request.prompt or request.input_ids or request.text or str(request.messages)
        entry = self._log[request_id] = Entry(received_s, url, prompt)
        delay = request.delay
        refused = [name for name in delay.refuses if name.encode() in body.replace(_delay_json(body), b"")]
        if refused:
            self._json(422, b'{"detail":"Unexpected fields: %b"}' % ", ".join(refused).encode())
            return
        fails = delay.fail and _is_hit(request_id, delay.fail_every)
        if fails and delay.fail == "status":
            self._json(503, b'{"error":{"message":"the pool is full","code":"overloaded"}}')
        elif not (fails and delay.fail == "hang"):
            _Stream(self._loop, self._transport, url, request, entry, delay.fail if fails else "").start(
                request_id
            )


class _Stream:
    """Writes one answer's chunks at their times."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        transport: asyncio.Transport,
        url: str,
        request: _Request,
        entry: Entry,
        fail: str,
    ) -> None:
        self._loop, self._transport, self._url = loop, transport, url
        self._request, self._entry, self._fail = request, entry, fail
        self._delay = request.delay
        is_native = url.endswith("/generate")
        self._total = request.sampling_params.max_new_tokens if is_native else request.max_tokens
        self._made = 0
        self._dues: Iterator[float] = iter(())

    def start(self, request_id: str) -> None:
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        self._dues = self._times(random.Random(f"{self._delay.seed} {request_id}"))
        self._loop.call_at(next(self._dues), self._write)

    def _times(self, rng: random.Random) -> Iterator[float]:
        delay = self._delay
        due = self._entry.received_s + delay.ttft_ms / 1e3
        index = 0
        while True:
            step = delay.itl_ms / 1e3
            yield -(-due // step) * step if delay.in_step else due
            index += 1
            gap = step * rng.paretovariate(delay.tail) if delay.tail else step
            due += gap * 10 if delay.slow_every and index % delay.slow_every == 0 else gap

    def _write(self) -> None:
        if self._transport.is_closing():
            return
        if self._fail == "empty":
            self._end(b"")
            return
        if self._fail and self._made >= 2:
            self._break()
            return
        num_tokens = min(self._delay.tokens_per_chunk, self._total - self._made)
        self._made += num_tokens
        is_last = self._made == self._total
        events = self._event(num_tokens, is_last)
        self._entry.writes_s.append(time.monotonic())
        if is_last:
            self._end(events)
        else:
            self._transport.write(_chunk(events))
            self._loop.call_at(next(self._dues), self._write)

    def _break(self) -> None:
        if self._fail == "error_event":
            self._end(b'data: {"error":{"message":"out of pages","code":"no_pages"}}\n\n')
        else:
            self._transport.abort()

    def _end(self, events: bytes) -> None:
        usage = b""
        if self._request.stream_options.include_usage and self._delay.usage and not self._fail:
            usage = b'data: {"choices":[],"usage":%b}\n\n' % self._usage()
        self._transport.write(_chunk(events + usage + b"data: [DONE]\n\n") + b"0\r\n\r\n")

    def _event(self, num_tokens: int, is_last: bool) -> bytes:
        text = b" w" * num_tokens
        finish = b'"length"' if is_last else b"null"
        ids = b",".join(b"7" for _ in range(num_tokens))
        if self._url.endswith("/generate"):
            info = b'{"prompt_tokens":%d,"completion_tokens":%d,"cached_tokens":%d,"finish_reason":%b}'
            reason = b'{"type":"length"}' if is_last else b"null"
            values = (self._num_prompt_tokens(), self._made, self._delay.cached_tokens, reason)
            return b'data: {"text":"%b","meta_info":%b}\n\n' % (b" w" * self._made, info % values)
        usage = b""
        if self._request.stream_options.continuous_usage_stats and self._delay.counts:
            usage = b',"usage":%b' % self._usage()
        extra = b',"token_ids":[%b]' % ids if self._delay.token_ids else b""
        body = b'"delta":{"content":"%b"}' if self._url.endswith("chat/completions") else b'"text":"%b"'
        choice = b'{"index":0,%b,"finish_reason":%b%b}' % (body % text, finish, extra)
        return b'data: {"id":"x","object":"chunk","choices":[%b]%b}\n\n' % (choice, usage)

    def _usage(self) -> bytes:
        details = b'{"cached_tokens":%d}' % self._delay.cached_tokens
        shape = b'{"prompt_tokens":%d,"completion_tokens":%d,"prompt_tokens_details":%b}'
        return shape % (self._num_prompt_tokens(), self._made, details)

    def _num_prompt_tokens(self) -> int:
        prompt = self._entry.prompt
        return len(prompt) if isinstance(prompt, list) else len(prompt.split())


def _delay_json(body: bytes) -> bytes:
    """The member `delay`, which names what it refuses."""
    return bytes(msgspec.json.decode(body, type=dict[str, msgspec.Raw]).get("delay", b"{}"))


def _is_hit(request_id: str, every: int) -> bool:
    """By the id that the client gives: bench-BLOCK-SESSION-TURN, where block 0 is probe and warm-up."""
    if not every:
        return True
    _, block, session, _ = request_id.split("-")
    return block != "0" and int(session) % every == 0


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def serve(port: int) -> None:
    """Until killed."""
    log: dict[str, Entry] = {}
    server = await asyncio.get_running_loop().create_server(lambda: Connection(log), "127.0.0.1", port)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def _loop_with_fine_timers() -> asyncio.AbstractEventLoop:
    """select() waits to the microsecond, where epoll and libuv round to milliseconds; below 1,024 sockets."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


@contextmanager
def running_delay_server(*, many: bool = False) -> Iterator[str]:
    """A server in a process of its own; yields its base URL. `many`: for thousands of connections."""
    argv = [sys.executable, "-m", "tests.support.delay_server", *(["--many"] if many else [])]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--many", action="store_true", help="libuv: many sockets, timers to the millisecond")
    args = parser.parse_args()
    ask_for_priority()  # so that what it logs is what it did, and not how it waited for a core
    factory = uvloop.new_event_loop if args.many else _loop_with_fine_timers
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve(args.port))


if __name__ == "__main__":
    main()
