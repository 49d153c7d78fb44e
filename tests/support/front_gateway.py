"""A gateway's end of a session with a worker's front."""

from __future__ import annotations

import asyncio

from phloem.shared.errors import PhloemError
from phloem.shared.protocol.cluster import WorkerLoad
from phloem.shared.protocol.session import (
    Ended,
    Hello,
    LoadReport,
    SamplingParams,
    SessionDown,
    SessionUp,
    StepMessage,
    Submit,
    TokensOut,
    Welcome,
)
from phloem.shared.rpc.client import RpcStream
from tests.support.worker_front import Front


class Gateway:
    """The other end of a session."""

    def __init__(self, front: Front) -> None:
        self.stream: RpcStream[SessionDown, SessionUp] = front.session()
        self.front = front
        self.answers = aiter(self.stream.__aiter__())
        self.steps: list[int] = []
        self.loads: list[WorkerLoad] = []

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

    async def first_tokens(self) -> None:
        """Returns when some tokens have come."""
        async with asyncio.timeout(10):
            await self.step()

    async def step(self) -> StepMessage:
        """The next step's message; what is told of the load in between is kept in `loads`."""
        while isinstance(message := await anext(self.answers), LoadReport):
            assert message.epoch == self.front.record.epoch
            self.loads.append(message.load)
        assert isinstance(message, StepMessage)
        return message

    async def collect(self, num_ended: int) -> dict[str, tuple[list[int], Ended]]:
        """Reads until `num_ended` requests have ended: their tokens and ends."""
        tokens: dict[str, list[int]] = {}
        ended: dict[str, Ended] = {}
        async with asyncio.timeout(10):
            while len(ended) < num_ended:
                message = await self.step()
                self.steps.append(message.step)
                for output in message.outputs:
                    assert output.request_id not in ended
                    match output:
                        case TokensOut():
                            tokens.setdefault(output.request_id, []).extend(output.token_ids)
                        case Ended():
                            ended[output.request_id] = output
        return {name: (tokens.get(name, []), end) for name, end in ended.items()}

    async def error(self) -> PhloemError:
        """Reads to the typed error that ends the session."""
        try:
            async with asyncio.timeout(10):
                async for _ in self.answers:
                    pass
        except PhloemError as error:
            return error
        raise AssertionError("the session ended without an error")
