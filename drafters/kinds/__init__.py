"""The kinds of drafter, one a file: how an engine is configured for it, and the tensors it owns."""
