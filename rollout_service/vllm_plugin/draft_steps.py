"""Draft steps of a completion: those without drafts are recorded too, so that each token can be attributed to a step.

vLLM's detailed record (`per_request_spec_decode_metrics`) has one entry for each step that had drafts. If a drafter
skips steps (n-grams that match nothing), nothing says where in the response the other steps are.
"""

import functools
from typing import Any

from rollout_service.vllm_plugin.patch import Patch

NAME = "vllm.v1.core.sched.scheduler.Scheduler.update_from_output"


def record_undrafted_steps() -> None:
    """Let vLLM's scheduler record "0 drafted, 0 accepted" when a request gains a token in a step without drafts."""
    from vllm.v1.core.sched.scheduler import Scheduler

    stock = Scheduler.update_from_output

    @functools.wraps(stock)
    def update_from_output(self: Any, scheduled: Any, output: Any) -> Any:
        if self.spec_decode_metrics_level == "detailed":
            for request_id in scheduled.num_scheduled_tokens:
                request = self.requests.get(request_id)
                if request is None or request.spec_decode_metrics is None:
                    continue
                gained = output.sampled_token_ids and output.sampled_token_ids[output.req_id_to_index[request_id]]
                if gained and not scheduled.scheduled_spec_decode_tokens.get(request_id):
                    request.spec_decode_metrics.per_step_drafted.append(0)
                    request.spec_decode_metrics.per_step_accepted.append(0)
        return stock(self, scheduled, output)

    Scheduler.update_from_output = update_from_output  # type: ignore[method-assign, assignment]


DRAFT_STEPS = Patch(
    NAME,
    "its detailed record of draft steps leaves out steps without drafts, so that tokens cannot be attributed to steps",
    when="when the plugin is loaded, on every device",
    unneeded="per_step_drafted has an entry for each step in which a request gains a token",
    apply=record_undrafted_steps,
    shown_by="tests/integration/test_patches.py::test_steps_without_drafts_are_recorded_by_the_patch_alone",
    relies_on={NAME: "self, scheduler_output, model_runner_output"},
)
