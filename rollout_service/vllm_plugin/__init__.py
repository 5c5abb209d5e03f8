"""Everything that touches vLLM's insides. vLLM calls `register` in each of its processes, before a model is built.

patches/                   functions that are wrong on this platform: tested, and replaced only if they fail
verification.py            the project's own verification, in the place of vLLM's
draft_steps.py             a record of every step of a completion
draft_length_lookup.py     the schedule of draft lengths, changed while the engine runs
idle_drafter.py            a drafter that rests while nothing is drafted, and catches up after
logprobs_without_text.py   log-probabilities of rollouts without each token's text
worker.py                  what the service asks of a worker: load weights in place, switch the draft sampling
core_process.py            the process of vLLM's core: forked from a server that has imported vLLM meanwhile
preloaded.py               what that server imports
parent_death.py            an engine's process ends with its parent
"""


def register() -> None:
    from rollout_service.vllm_plugin.draft_length_lookup import let_draft_lengths_change
    from rollout_service.vllm_plugin.draft_steps import record_undrafted_steps
    from rollout_service.vllm_plugin.logprobs_without_text import leave_flat_logprobs_undecoded
    from rollout_service.vllm_plugin.parent_death import end_with_parent
    from rollout_service.vllm_plugin.patches import apply_patches

    end_with_parent()
    apply_patches()
    record_undrafted_steps()
    let_draft_lengths_change()
    leave_flat_logprobs_undecoded()
