"""Cache salt: it keeps requests that begin after a push from finding the old weights' keys and values in the KV cache.

Each policy version has a salt of its own, in engines that keep their cache across pushes (`weights.kv_cache = "keep"`).
"""

from collections.abc import Callable
from typing import Any

from rollout_service.vllm_plugin.patch import Patch

NAME = "vllm.v1.engine.async_llm.AsyncLLM.generate"


def salt_prompts(llm: Any, version: Callable[[], int]) -> None:
    """From now on every prompt that `llm.generate` is given has the salt of `version()`, followed by its own. vLLM's
    routes call the same method, so their prompts are salted as well."""
    generate = llm.generate

    def salted(prompt: dict[str, Any], *arguments: Any, **more: Any) -> Any:
        salt = " ".join(["policy", str(version()), *filter(None, [prompt.get("cache_salt")])])
        return generate({**prompt, "cache_salt": salt}, *arguments, **more)

    llm.generate = salted


CACHE_SALT = Patch(
    NAME,
    "prompts that come after a push find prefixes that were cached under the version before",
    when='on the engine\'s own object, on every device, with weights.running = "keep" and weights.kv_cache = "keep"',
    unneeded="vLLM's prefix cache tells versions of the weights apart",
    apply=salt_prompts,
    shown_by="tests/integration/test_pushes.py::test_what_begins_after_a_push_does_not_meet_a_kept_cache_on_any_route",
    relies_on={NAME: "self, prompt, ..."},
)
