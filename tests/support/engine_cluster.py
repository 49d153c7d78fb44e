"""Prefill and decode engines in one process, joined by real KV channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from phloem.shared.engine.models.decoder import Decoder
from phloem.shared.protocol.session import SamplingParams
from tests.support.engines import EngineSpec, LocalEngine


@dataclass(frozen=True)
class EngineCluster:
    prefill: list[LocalEngine]
    decode: list[LocalEngine]

    @property
    def engines(self) -> list[LocalEngine]:
        return self.prefill + self.decode

    def submit(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        p: int = 0,
        d: int = 0,
        num_prompt_tokens: int | None = None,
        salt: str = "",
    ) -> None:
        """Submits to prefill engine `p` and decode engine `d` at once, as a gateway does."""
        prefill, decode = self.prefill[p], self.decode[d]
        decode.submit(
            request_id,
            token_ids,
            sampling,
            phase="decode",
            peer=prefill.ref,
            num_prompt_tokens=num_prompt_tokens,
            salt=salt,
        )
        prefill.submit(
            request_id,
            token_ids,
            sampling,
            phase="prefill",
            peer=decode.ref,
            num_prompt_tokens=num_prompt_tokens,
            salt=salt,
        )

    def wait_tokens(self, request_id: str, *, p: int = 0, d: int = 0) -> list[int]:
        """Token 0 from the prefill engine and the others from the decode engine, in order."""
        first = self.prefill[p].wait_end(request_id)
        assert (first.ended, first.error) == ("handed_over", None)
        assert len(first.token_ids) == 1
        rest = self.decode[d].wait_end(request_id)
        assert (rest.ended, rest.error) == ("finished", None)
        return first.token_ids + rest.token_ids


@contextmanager
def running_cluster(
    decoder: Decoder,
    prefill: int = 1,
    decode: int = 1,
    *,
    spec: EngineSpec | None = None,
    decode_spec: EngineSpec | None = None,
) -> Iterator[EngineCluster]:
    """Every prefill engine is joined to every decode engine; all are audited at the end."""
    spec = spec or EngineSpec()
    with ExitStack() as stack:
        cluster = EngineCluster(
            [_start(stack, f"p{i}", decoder, replace(spec, role="prefill")) for i in range(prefill)],
            [
                _start(stack, f"d{i}", decoder, replace(decode_spec or spec, role="decode"))
                for i in range(decode)
            ],
        )
        for sender in cluster.prefill:
            for receiver in cluster.decode:
                sender.connect(receiver)
        yield cluster
        for engine in cluster.engines:
            engine.audit_idle()


def _start(stack: ExitStack, name: str, decoder: Decoder, spec: EngineSpec) -> LocalEngine:
    return stack.enter_context(LocalEngine(name, decoder, spec))
