"""The gateway's view of the cluster: who is there, where a request goes, and how it survives their loss.

`ClusterClient` is the door. A request's way: `membership` knows the workers, `index_client` which of them
hold its prefix, `routing` picks a pair, `worker_session` carries it over, `request` merges the tokens of
both workers in order and decides what a failure means. Never imports torch.
"""
