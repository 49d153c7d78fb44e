"""Every message between processes: frozen, tagged msgspec structs, encoded as MessagePack.

Fields are only ever appended, with defaults, so that two versions can talk to each other during a rolling
upgrade. One module per conversation: `session` (gateway <-> worker), `engine` (front <-> engine),
`transfer` (prefill engine <-> decode engine), `index` (worker, gateway <-> cache_index), `cluster`
(what is registered in Redis).
"""
