"""The engine: requests, scheduler, KV pool, radix tree, model runner. One process, one step loop."""
