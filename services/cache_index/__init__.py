"""The prefix index: which live worker holds which leading blocks of a prompt. Stateless over Redis."""
