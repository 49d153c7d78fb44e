"""`phloem bench offline`: the engine without a server, each figure beside its floor."""
