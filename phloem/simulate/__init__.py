"""Replays a trace through the cluster's own decisions, on one CPU.

Real: the gateway's `route` and recent placements, the index's matching, the block hashes, the engine's radix
tree, KV pool, page account and scheduler. Modelled: how long a step, a KV transfer and a message take
(`step_time`), and who learns of what how late (`index`, `heartbeats`). Never imports torch.

    workload -> arrivals -> SimGateway -> SimWorker (prefill) -> KvSender -> SimWorker (decode) -> Outcome
"""
