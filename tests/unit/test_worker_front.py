"""A worker's front over a fake engine: real gRPC, a real Valkey, a real child process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from phloem.shared.protocol.session import (
    Abort,
    Ended,
    Hello,
    SamplingParams,
    SessionDown,
    SessionUp,
    StepMessage,
    Submit,
    TokensOut,
    Welcome,
)
from phloem.shared.rpc.client import RpcStream
from tests.support.fake_engine import FIRST_TOKEN
from tests.support.valkey import ValkeyServer
from tests.support.worker_front import Front, raises_code, running_front


class Gateway:
    """The other end of a session."""

    def __init__(self, stream: RpcStream[SessionDown, SessionUp], front: Front) -> None:
        self.stream = stream
        self.front = front
        self.answers = aiter(stream.__aiter__())
        self.steps: list[StepMessage] = []

    async def hello(self, gateway_id: str = "g1") -> Welcome:
        await self.stream.write(Hello(gateway_id))
        answer = await anext(self.answers)
        assert isinstance(answer, Welcome)
        return answer

    async def submit(
        self, request_id: str, max_tokens: int, *, epoch: int | None = None, first: int = 1
    ) -> None:
        await self.stream.write(
            Submit(
                request_id=request_id,
                attempt=1,
                epoch=self.front.record.epoch if epoch is None else epoch,
                phase="both",
                token_ids=[first, 2, 3],
                num_prompt_tokens=3,
                sampling=SamplingParams(max_tokens=max_tokens),
                block_hashes=[request_id.encode().ljust(16, b"-")],
            )
        )

    async def collect(self, num_ended: int) -> dict[str, tuple[list[int], Ended]]:
        """Reads until `num_ended` requests have ended: their tokens and ends."""
        tokens: dict[str, list[int]] = {}
        ended: dict[str, Ended] = {}
        async with asyncio.timeout(10):
            while len(ended) < num_ended:
                message = await anext(self.answers)
                assert isinstance(message, StepMessage)
                self.steps.append(message)
                for output in message.outputs:
                    assert output.request_id not in ended
                    match output:
                        case TokensOut():
                            tokens.setdefault(output.request_id, []).extend(output.token_ids)
                        case Ended():
                            ended[output.request_id] = output
        return {name: (tokens.get(name, []), end) for name, end in ended.items()}


@pytest.fixture
async def front(valkey: ValkeyServer, tmp_path: Path) -> AsyncIterator[Front]:
    async with running_front(valkey.url, tmp_path) as front:
        yield front


async def test_request_gets_its_tokens_and_one_end(front: Front) -> None:
    gateway = Gateway(front.session(), front)
    welcome = await gateway.hello()
    assert (welcome.worker_id, welcome.epoch, welcome.role) == ("w1", front.record.epoch, "unified")
    await gateway.submit("r", 4)
    tokens, ended = (await gateway.collect(1))["r"]
    assert tokens == [FIRST_TOKEN + n for n in range(4)]
    assert ended.reason == "finished"
