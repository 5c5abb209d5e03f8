"""Everything that touches vLLM's insides. vLLM calls `register` in each of its processes, before a model is built.

table.py                   every function that is replaced or wrapped; `rollout-service patches` prints it
patch.py                   what a row of the table is
patches/                   functions that are wrong on this platform: tested, and replaced only if they fail
verification.py            the project's own verification, in the place of vLLM's
draft_steps.py             a record of every step of a completion, steps without drafts included
draft_length_lookup.py     the schedule of draft lengths, changed while the engine runs
idle_drafter.py            a drafter that is idle while nothing is drafted, and catches up afterwards
routed_experts.py          the experts that a CPU engine's routers chose, returned with each completion
mapped_update.py            an update's file as a worker reads it: mapped, checked, and on a GPU pinned
logprobs_without_text.py   log-probabilities of rollouts without each token's text
cache_salt.py              entries of a KV cache that is kept across pushes, separated by weight version
unsendable.py              the client's error for a request that cannot be sent to vLLM's core
grammars.py                grammars that vLLM sets itself, refused beside drafts on a CPU
watched_outputs.py         what the engine gave to each request on vLLM's own routes
token_names.py             a token's name in the log-probabilities of /inference/v1/generate, as clients read it
generate_parameters.py     parameters of /inference/v1/generate: within the context, without text that nobody reads
required_prefix.py         a chat prompt that begins with exactly the tokens of the turns before
own_policies.py            policy families of this project's own, made known to vLLM
models/                    their models
worker.py                  what the service asks of a worker: load weights in place, switch the draft sampling
weight_digests.py          what a model holds, as one number for each module
core_process.py            the process of vLLM's core: forked from a server that has imported vLLM meanwhile
preloaded.py               what that server imports
parent_death.py            an engine's process ends with its parent
"""


def register() -> None:
    from rollout_service.vllm_plugin.own_policies import register_own_policies
    from rollout_service.vllm_plugin.parent_death import end_with_parent
    from rollout_service.vllm_plugin.table import apply_patches

    end_with_parent()
    register_own_policies()
    apply_patches()
