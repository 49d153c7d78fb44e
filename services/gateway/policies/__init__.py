"""Where a request may go: each policy a pure function of a snapshot, so that the cluster, tests and a
simulator run the same code. `phloem.services.gateway.cluster.routing` is the door.

`snapshot` has what a decision is made from and the decision itself; `pools` which workers can serve together;
`cost` and `cost_model` are the default policy, in seconds; the others are `Scores`: numbers for each side.
"""
