"""What vLLM's core process imports, for the server that it is forked from: that loads this module, and then waits."""

from rollout_service.imports import uncollected

with uncollected():
    import vllm.v1.engine.core  # noqa: F401
