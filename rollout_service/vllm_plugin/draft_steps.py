"""Every step in a completion's record of draft steps, those without drafts too, so that each token can be attributed.

vLLM's detailed record (`per_request_spec_decode_metrics`) has one entry a step that had drafts. Where a drafter skips
steps (n-grams that match nothing), nothing says where in the response the others stand.
"""

from typing import Any


def record_undrafted_steps() -> None:
    """Let vLLM's scheduler note "0 drafted, 0 accepted" where a request gains a token in a step without drafts."""
    from vllm.v1.core.sched.scheduler import Scheduler

    stock = Scheduler.update_from_output
    if getattr(stock, "records_undrafted_steps", False):  # vLLM loads its plugins more than once in a process
        return

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

    update_from_output.records_undrafted_steps = True  # type: ignore[attr-defined]
    Scheduler.update_from_output = update_from_output  # type: ignore[method-assign, assignment]
