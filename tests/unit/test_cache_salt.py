"""Requests that begin after a push must not find keys and values of the old weights, whatever their route."""

from types import SimpleNamespace

from rollout_service.vllm_plugin.cache_salt import salt_prompts


def test_every_prompt_has_the_salt_of_its_policy_version_and_keeps_its_own():
    given, versions = [], iter([0, 1, 1])
    llm = SimpleNamespace(generate=lambda prompt, *arguments: given.append((prompt["cache_salt"], arguments)))
    salt_prompts(llm, lambda: next(versions))
    mine = {"prompt_token_ids": [1], "cache_salt": "mine"}
    for prompt in ({"prompt_token_ids": [1]}, {"prompt_token_ids": [1]}, mine):
        llm.generate(prompt, "params", "id")
    assert given == [(salt, ("params", "id")) for salt in ("policy 0", "policy 1", "policy 1 mine")]
    assert mine["cache_salt"] == "mine"
