"""What every handler works with: configuration, cluster, model, text, limits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from phloem.services.gateway.admission import Admission
from phloem.services.gateway.call import Call
from phloem.services.gateway.config import GatewayConfig
from phloem.services.gateway.generation import GenerationRequest, Generator
from phloem.services.gateway.metrics import GatewayMetrics
from phloem.services.gateway.sampling import SamplingPlan
from phloem.services.gateway.sequence import OnDelta, RunningSequence
from phloem.services.gateway.served_model import ServedModel
from phloem.services.gateway.text.prompt_encoder import PromptEncoder, context_length_exceeded
from phloem.shared.errors import PhloemError, invalid_request


class Gateway:
    """One per process. Owns nothing: `main` opens and closes the parts."""

    def __init__(
        self,
        config: GatewayConfig,
        generator: Generator,
        encoder: PromptEncoder,
        model: ServedModel,
        metrics: GatewayMetrics,
    ) -> None:
        self.config = config
        self.generator = generator
        self.encoder = encoder
        self.model = model
        self.metrics = metrics
        # The cluster client keeps the deadline; this much later the gateway stops waiting for it.
        self.deadline_slack_s = 5.0
        self.admission = Admission(
            total=config.max_inflight_requests,
            per_tenant=config.inflight_limit_per_key,
            gauge=metrics.inflight_sequences,
        )

    @property
    def context_length(self) -> int:
        """Longest prompt + output: the model's, or less when the workers were started with less."""
        workers = self.generator.model_info().context_length
        return min(workers, self.model.context_length) if workers else self.model.context_length

    def check_tokens(self, token_ids: Sequence[int], param: str) -> None:
        """Raises `PhloemError` (400, `token_out_of_range`) for an id that the model doesn't have."""
        size = self.model.vocab_size
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= size):
            position, wrong = next((i, t) for i, t in enumerate(token_ids) if not 0 <= t < size)
            raise invalid_request(
                f"{param}[{position}] is {wrong}: token ids are from 0 to {size - 1}",
                param=f"{param}[{position}]",
                code="token_out_of_range",
            )

    def sequences(
        self,
        call: Call,
        prompts: Sequence[list[int]],
        sampling: SamplingPlan,
        *,
        cache_salt: str | None,
        param: str,
        continues_text: bool,
        default_max_tokens: int = 0,
    ) -> list[RunningSequence]:
        """The sequences of a request, `n` for each prompt in order, not started yet.

        `param` names the prompts in errors; `continues_text` says whether the output goes on where a prompt's
        text stops; `default_max_tokens` holds for a request that names no max_tokens (0: the operator's
        default). Raises `PhloemError` (400): `empty_prompt`, `context_length_exceeded`.
        """
        made = []
        context_length = self.context_length
        for prompt_index, prompt in enumerate(prompts):
            where = param if len(prompts) == 1 else f"{param}[{prompt_index}]"
            max_tokens = self._max_tokens(
                len(prompt), sampling.max_tokens, default_max_tokens, context_length, where
            )
            for choice in range(sampling.n):
                index = prompt_index * sampling.n + choice
                request = GenerationRequest(
                    request_id=call.request_id if index == 0 else f"{call.request_id}-{index}",
                    token_ids=prompt,
                    sampling=sampling.params(choice, max_tokens),
                    cache_salt=call.tenant.cache_salt(cache_salt),
                    timeout_s=self.config.request_timeout_s,
                )
                context = prompt if continues_text else ()
                made.append(self._sequence(call, request, sampling, index, prompt_index, context))
        return made

    def _sequence(
        self,
        call: Call,
        request: GenerationRequest,
        sampling: SamplingPlan,
        index: int,
        prompt_index: int,
        context: Sequence[int],
    ) -> RunningSequence:
        return RunningSequence(
            request,
            index=index,
            prompt_index=prompt_index,
            stops=sampling.stops,
            detokenizer=self.encoder.detokenizer(context, skip_special_tokens=sampling.skip_special_tokens),
            received_at=call.received_at,
        )

    async def run(self, sequences: Sequence[RunningSequence], on_delta: OnDelta) -> None:
        """Runs all at once until the last has ended, telling `on_delta` of each addition.

        Raises the first error, with all others stopped; when cancelled it aborts all.
        """
        try:
            async with asyncio.timeout(self.config.request_timeout_s + self.deadline_slack_s):
                if len(sequences) == 1:
                    await sequences[0].run(self.generator, self.metrics, on_delta)
                else:
                    await self._run_all(sequences, on_delta)
        except TimeoutError as error:
            raise PhloemError(
                "request_timeout",
                f"the request took longer than {self.config.request_timeout_s:g} s",
                http_status=504,
            ) from error

    async def _run_all(self, sequences: Sequence[RunningSequence], on_delta: OnDelta) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for sequence in sequences:
                    group.create_task(sequence.run(self.generator, self.metrics, on_delta))
        except BaseExceptionGroup as errors:
            raise _first(errors) from errors

    def _max_tokens(
        self, num_prompt: int, asked: int | None, default: int, context_length: int, param: str
    ) -> int:
        if num_prompt == 0:
            raise invalid_request(f"{param} is empty", param=param, code="empty_prompt")
        room = context_length - num_prompt
        if room < 1 or (asked is not None and asked > room):
            raise context_length_exceeded(num_prompt, asked, context_length, param)
        return asked if asked is not None else min(room, default or self.config.default_max_tokens or room)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
