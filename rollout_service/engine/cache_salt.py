"""A salt for the KV cache of each policy version: what begins after a push must not find the old weights' keys and
values. For engines that keep their cache across pushes (`weights.kv_cache = "keep"`)."""

from collections.abc import Callable
from typing import Any


def salt_prompts(llm: Any, version: Callable[[], int]) -> None:
    """From now on every prompt that `llm.generate` is given has the salt of `version()`, with its own after it. vLLM's
    routes call the same method: they are salted as the service's own."""
    generate = llm.generate

    def salted(prompt: dict[str, Any], *arguments: Any, **more: Any) -> Any:
        salt = " ".join(["policy", str(version()), *filter(None, [prompt.get("cache_salt")])])
        return generate({**prompt, "cache_salt": salt}, *arguments, **more)

    llm.generate = salted
