"""What one worker said about one request, checked as it comes."""

from __future__ import annotations

from dataclasses import dataclass, field

from phloem.shared.errors import ErrorInfo
from phloem.shared.protocol.session import Ended, EndReason, FinishReason, Output, TokensOut


@dataclass
class Stream:
    """What one worker said about one request."""

    first_index: int
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    ended: EndReason | None = None
    error: ErrorInfo | None = None

    def take(self, output: Output) -> None:
        assert self.ended is None, f"{output} came after the end"
        match output:
            case TokensOut():
                assert self.finish_reason is None, f"{output} came after the last token"
                assert output.start == self.first_index + len(self.token_ids), f"{output} leaves a gap"
                self.token_ids += output.token_ids
                self.finish_reason = output.finish_reason
                self.num_cached_tokens += output.num_cached_tokens
            case Ended():
                self.ended, self.error = output.reason, output.error
