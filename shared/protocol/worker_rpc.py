"""The unary calls of a worker's front, beside its session stream."""

from __future__ import annotations

import msgspec

from phloem.shared.protocol.codec import Codec
from phloem.shared.protocol.engine import AuditReply

WORKER_SERVICE = "phloem.Worker"  # methods: Session (stream), Flush, Audit, Drain


class FlushRequest(msgspec.Struct, frozen=True):
    epoch: int


class AuditCall(msgspec.Struct, frozen=True):
    epoch: int


class DrainRequest(msgspec.Struct, frozen=True):
    epoch: int


class Done(msgspec.Struct, frozen=True):
    pass


flush_request: Codec[FlushRequest] = Codec(FlushRequest)
audit_call: Codec[AuditCall] = Codec(AuditCall)
audit_reply: Codec[AuditReply] = Codec(AuditReply)
drain_request: Codec[DrainRequest] = Codec(DrainRequest)
done: Codec[Done] = Codec(Done)
