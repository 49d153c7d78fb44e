"""The load: raw sockets, one request after another on each, nothing looked at before the clock has stopped.

    python -m benchmarks.gateway.client

One JSON `Load` per line on stdin, one JSON `Outcome` per line on stdout.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from typing import cast

import msgspec
import uvloop

_END = b"0\r\n\r\n"  # of a chunked body
_TIMEOUT_S = 300.0


class Load(msgspec.Struct, frozen=True):
    """`streams` connections, `repeats` requests on each."""

    port: int
    request: str
    streams: int
    repeats: int


class Outcome(msgspec.Struct, frozen=True):
    """`cpu_s` is this process's own between first and last byte; `texts` the distinct ones that came;
    `num_tokens` what the servers counted, where they did."""

    seconds: float
    cpu_s: float
    num_requests: int
    num_events: int
    num_bytes: int
    num_tokens: int
    texts: list[str]


class Delta(msgspec.Struct):
    content: str = ""


class Choice(msgspec.Struct):
    delta: Delta


class Usage(msgspec.Struct):
    completion_tokens: int


class Event(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None


class Connection(asyncio.Protocol):
    """Sends the request `repeats` times, each when the answer before it is complete."""

    def __init__(self, request: bytes, repeats: int) -> None:
        self.answers: list[list[bytes]] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._repeats = repeats

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def start(self) -> None:
        self.answers.append([])
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.answers[-1].append(data)
        if data.endswith(_END):
            if len(self.answers) < self._repeats:
                self.start()
            else:
                self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError(b"".join(self.answers[-1])[-500:]))

    def close(self) -> None:
        self._transport.close()


async def run(load: Load) -> Outcome:
    loop = asyncio.get_running_loop()
    connections: list[Connection] = []
    for _ in range(load.streams):
        _, connection = await loop.create_connection(
            lambda: Connection(load.request.encode(), load.repeats), "127.0.0.1", load.port
        )
        connections.append(connection)
    gc.collect()
    gc.disable()
    start, cpu = time.perf_counter(), time.process_time()
    for connection in connections:
        connection.start()
    async with asyncio.timeout(_TIMEOUT_S):
        await asyncio.gather(*(connection.done for connection in connections))
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    gc.enable()
    for connection in connections:
        connection.close()
    return outcome(seconds, cpu_s, [b"".join(a) for connection in connections for a in connection.answers])


def outcome(seconds: float, cpu_s: float, answers: list[bytes]) -> Outcome:
    decoder = msgspec.json.Decoder(Event)
    num_events = num_tokens = 0
    texts = set()
    for answer in answers:
        head, _, body = answer.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"the server answered {answer[:500]!r}")
        events = [decoder.decode(data) for data in events_of(body)]
        texts.add("".join(event.choices[0].delta.content for event in events if event.choices))
        num_events += sum(bool(event.choices) for event in events)
        num_tokens += sum(event.usage.completion_tokens for event in events if event.usage)
    num_bytes = sum(map(len, answers))
    return Outcome(seconds, cpu_s, len(answers), num_events, num_bytes, num_tokens, sorted(texts))


def events_of(chunked: bytes) -> list[bytes]:
    """The data of the events of a complete body, `[DONE]` left out; it must be the last."""
    pieces, start = [], 0
    while True:
        size_end = chunked.index(b"\r\n", start)
        size = int(chunked[start:size_end], 16)
        if size == 0:
            break
        pieces.append(chunked[size_end + 2 : size_end + 2 + size])
        start = size_end + 2 + size + 2
    *events, done, empty = b"".join(pieces).split(b"\n\n")
    assert (done, empty) == (b"data: [DONE]", b""), "the stream is cut off"
    return [event.removeprefix(b"data: ") for event in events]


def main() -> None:
    load = msgspec.json.Decoder(Load)
    for line in sys.stdin:
        outcome = uvloop.run(run(load.decode(line)))
        print(msgspec.json.encode(outcome).decode(), flush=True)


if __name__ == "__main__":
    main()
