"""Plain torch: the specification of every op, and the CPU path."""
