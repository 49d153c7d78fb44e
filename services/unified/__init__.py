"""A unified worker: the shared engine, with both phases in one process."""
