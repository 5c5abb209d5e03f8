"""The kinds of drafter, one file each: how an engine is configured for the kind, and the tensors that it owns."""
