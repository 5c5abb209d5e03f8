"""Policies of this project's own, as vLLM serves them. May import vLLM when they are built."""
