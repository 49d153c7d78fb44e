"""KV transfer between a prefill engine and a decode engine.

A channel joins two engine processes: a control TCP connection (frames of `protocol.transfer`, in order) and
a two-rank process group of its own for the bytes. Life of one channel:

1. `Dialer` (prefill side) connects to the `Listener` (decode side); both prove that they know the cluster
   secret (`handshake`).
2. Each side borrows staging memory from its `StagingPool`, or refuses; a dialer that is refused tries again
   ever more rarely (`redial`), and its engine says that it is cut off from the peer.
   `Open` / `Opened` agree on epochs, layout and slot size; both ranks find each other over the same
   connection (`rendezvous`) and join the process group of a `DataPlane`; one byte goes through it.
3. Three threads serve a `Channel`: its own reads control frames, `write` sends them (a piece's at once, a
   credit when its slot is emptied) and posts data, which the device sends when it is gathered; `complete`
   waits for gathered and posted data in order. A piece's digest follows it. Silence past the deadline, a
   broken rule or a dead peer ends all three with one `ChannelLost`.

The engine's thread talks to `TransferEndpoint` only, never blocks there, and is answered by events.
"""
