"""Preloaded modules: vLLM's core process is forked from a server that has imported this one."""

from rollout_service.imports import uncollected

with uncollected():
    import vllm.v1.engine.core
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        import vllm.v1.worker.cpu_worker  # noqa: F401
