"""A prefill worker: the shared engine, with the role that prefills and hands over."""
