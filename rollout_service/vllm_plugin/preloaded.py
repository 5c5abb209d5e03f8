"""What vLLM's core process imports, for the server that it is forked from: that loads this module, and then waits."""

from rollout_service.imports import uncollected

with uncollected():
    import vllm.v1.engine.core
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        import vllm.v1.worker.cpu_worker  # noqa: F401
