"""Who is there: leases with epochs in Redis, and immutable snapshots of the cluster.

`Registry` is the door; `LeaseKeeper` holds one lease for a process; `claim_device` shares out the
accelerators of a host; `cluster_secret` agrees on the key that authenticates services and blocks.
"""
