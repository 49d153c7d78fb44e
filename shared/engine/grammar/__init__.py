"""Answers that must follow a grammar: compiled apart, matched per request, masked per step."""
