"""The front of a worker: gRPC sessions, registration, metrics and index events, beside the engine process.

One request's way through it: `sessions` reads its Submit from the gateway's stream and puts it into the
engine's outbox; `engine_process` sends all that waits there in one frame; each `StepReport` that comes back
is split by gateway and becomes one `StepMessage` per session. Never imports torch.
"""
