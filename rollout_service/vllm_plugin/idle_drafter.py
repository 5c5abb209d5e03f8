"""Idle drafter: it does not run while it is asked for no drafts, and its KV cache catches up when drafts begin again.

vLLM runs the drafter's first forward pass at draft length zero too, so that its KV cache has no holes when drafts begin
again. Here, what that forward pass would have read is held instead. Before a request's next drafts, one forward pass
over all its held tokens fills the holes. A request that ends before that, or a few tokens later, costs nothing.

What is held is found by its slot in the KV cache. So it is shared, kept and overwritten as the cache's blocks are,
prefixes of other requests included.

A step without drafts verifies nothing either. It samples as an engine without a drafter does.

B requests, T positions, N tokens, S slots of the KV cache, C rows of held states. For models of text whose drafter has
one KV cache group.
"""

from typing import Any

import torch
from torch import Tensor

from rollout_service.vllm_plugin.patch import Patch

HELD_BYTES = 512 * 2**20
"""bytes of the policy's hidden states that are held; the oldest are overwritten first. A hole that is never filled
lowers acceptance, and does nothing else"""

CATCH_UP = 8
"""a request that can get at most so many more tokens is not brought up to date, because that would take longer than
its drafts would save"""


class IdleDrafter:
    """Stands in for three methods of vLLM's model runner, and calls them when there is something to do."""

    def __init__(self, runner: Any):
        for patch in IDLE_DRAFTER:
            patch.check()
        self.runner, self.drafter = runner, runner.drafter
        slots, device = runner.kv_cache_config.num_blocks * self.drafter.block_size, self.drafter.device
        self.row_of_slot_S = torch.full((slots,), -1, device=device)
        """the row that holds a slot's state, or -1 if the drafter wrote the slot; it counts if the row's slot agrees"""
        self.token_of_slot_S = torch.zeros(slots, dtype=torch.int32, device=device)
        self.states_CH: Tensor | None = None
        """what the drafter reads of the policy (H = 0 if it reads nothing); None until something is held"""
        self.slot_of_row_C = self.rows_C = torch.empty(0)
        self.next_row = 0
        self.up_to_date: frozenset[str] = frozenset()
        """requests without holes"""
        self.behind: frozenset[str] = frozenset()
        """requests with holes, as the last step without drafts left them"""
        self.drafted = True
        """whether the last step drafted"""
        self.stock_sample, self.stock_propose = runner._sample, runner.propose_draft_token_ids
        self.stock_take = runner.take_draft_token_ids
        runner._sample, runner.propose_draft_token_ids = self.sample, self.propose
        runner.take_draft_token_ids = self.take

    def sample(self, logits: Tensor | None, spec_decode_metadata: Any) -> Any:
        """`GPUModelRunner._sample`."""
        drafted = spec_decode_metadata is not None and any(spec_decode_metadata.num_draft_tokens)
        return self.stock_sample(logits, spec_decode_metadata if drafted else None)

    def take(self) -> Any:
        """`GPUModelRunner.take_draft_token_ids`. None leaves the scheduler as it is, which forgets drafts when it
        schedules them. To hand over empty drafts would take Python's lock, which vLLM's output thread has then."""
        return self.stock_take() if self.drafted else None

    def propose(
        self,
        scheduler_output: Any,
        sampled_token_ids: Tensor,
        sampling_metadata: Any,
        hidden_states: Tensor,
        sample_hidden_states: Tensor,
        aux_hidden_states: list[Tensor] | None,
        spec_decode_metadata: Any,
        common_attn_metadata: Any,
        slot_mappings: Any,
    ) -> Any:
        """`GPUModelRunner.propose_draft_token_ids`."""
        runner, metadata = self.runner, common_attn_metadata
        slots_N, tokens_N = metadata.slot_mapping, runner.input_ids.gpu[: len(metadata.slot_mapping)]
        requests = runner.input_batch.req_ids
        worth = []
        if scheduler_output.num_spec_tokens_to_schedule > 0:
            worth = [name not in self.behind or self._left(name) > CATCH_UP for name in requests]
        self.drafted = any(worth)
        if not self.drafted:
            self._hold(slots_N, tokens_N, aux_hidden_states or [hidden_states])
            self.up_to_date, self.behind = frozenset(), frozenset(requests)
            return torch.empty(metadata.batch_size(), 0, dtype=torch.int64, device=slots_N.device)
        if self.states_CH is not None:
            if not self.up_to_date.issuperset(requests):
                worth_B = torch.tensor(worth, device=slots_N.device)
                while self._fill(metadata, tokens_N, worth_B):
                    pass
                self.up_to_date = frozenset(name for name, it_is in zip(requests, worth, strict=True) if it_is)
                self.behind -= self.up_to_date
            self.row_of_slot_S[slots_N] = -1
            self.token_of_slot_S[slots_N] = tokens_N
        return self.stock_propose(
            scheduler_output,
            sampled_token_ids,
            sampling_metadata,
            hidden_states,
            sample_hidden_states,
            aux_hidden_states,
            spec_decode_metadata,
            metadata,
            slot_mappings,
        )

    def _left(self, name: str) -> int:
        """The most tokens that a request may get after this step's own."""
        request = self.runner.requests[name]
        return request.sampling_params.max_tokens - len(request.output_token_ids) - 1

    def _hold(self, slots_N: Tensor, tokens_N: Tensor, states: list[Tensor]) -> None:
        if not self.drafter.pass_hidden_states_to_model:
            states = [states_NH[:, :0] for states_NH in states]
        if self.states_CH is None:
            width = sum(states_NH.shape[1] for states_NH in states)
            slots, row_bytes = len(self.row_of_slot_S), width * states[0].element_size()
            rows = max(self.drafter.max_num_tokens, min(slots, HELD_BYTES // max(row_bytes, 1)))
            self.states_CH = states[0].new_empty(rows, width)
            self.slot_of_row_C = torch.full((rows,), -1, device=slots_N.device)
            self.rows_C = torch.arange(rows, device=slots_N.device)
        begin = self.next_row if self.next_row + len(slots_N) <= len(self.states_CH) else 0
        self.next_row = begin + len(slots_N)
        rows = slice(begin, self.next_row)  # not indices, which are slower: this is what length zero costs
        torch.cat([states_NH[: len(slots_N)] for states_NH in states], dim=-1, out=self.states_CH[rows])
        self.slot_of_row_C[rows] = slots_N
        self.row_of_slot_S[slots_N] = self.rows_C[rows]
        self.token_of_slot_S[slots_N] = tokens_N

    def _fill(self, metadata: Any, tokens_N: Tensor, worth_B: Tensor) -> bool:
        """Let the drafter read the first run of held tokens of each request that is worth it, as many as its buffers
        take. Returns whether there were any. `tokens_N` are the step's own tokens, which follow the held ones."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        drafter, size = self.drafter, self.drafter.block_size
        computed_B = metadata.seq_lens - metadata.naive_query_lens()
        positions_T = torch.arange(int(computed_B.max()) + 1, device=computed_B.device)
        slots_BT = metadata.block_table_tensor[:, positions_T // size].long() * size + positions_T % size
        rows_BT = self.row_of_slot_S[slots_BT]
        held_BT = (rows_BT >= 0) & (self.slot_of_row_C[rows_BT.clamp(min=0)] == slots_BT)
        held_BT &= (positions_T < computed_B[:, None]) & worth_B[:, None]
        if not held_BT.any():
            return False
        begins_B = held_BT.int().argmax(dim=1)
        ended_BT = (~held_BT & (positions_T >= begins_B[:, None])).cumsum(dim=1) > 0
        run_BT = held_BT & ~ended_BT
        room = drafter.max_num_tokens - len(run_BT) * drafter.net_num_new_slots_per_request
        run_BT &= (run_BT.flatten().cumsum(0) <= room).view_as(run_BT)

        lengths_B = run_BT.sum(dim=1)
        behind = lengths_B > 0
        ends_B = (begins_B + lengths_B)[behind]
        requests = behind.nonzero().squeeze(1)
        # The token after a run is held as well, or it is the first of this step.
        next_B = self.token_of_slot_S[slots_BT[requests, ends_B]]
        first_B = tokens_N[metadata.query_start_loc[:-1].long()][behind]
        starts = torch.nn.functional.pad(lengths_B[behind].cumsum(0), (1, 0)).int()
        slots_N = slots_BT[run_BT]
        assert self.states_CH is not None
        self.drafter.propose(
            0,
            target_token_ids=self.token_of_slot_S[slots_N],
            target_positions=positions_T.expand_as(run_BT)[run_BT],
            target_hidden_states=self.states_CH[rows_BT[run_BT]],
            next_token_ids=torch.where(ends_B == computed_B[behind], first_B, next_B),
            token_indices_to_sample=None,
            common_attn_metadata=CommonAttentionMetadata(
                query_start_loc=starts,
                query_start_loc_cpu=starts.cpu(),
                seq_lens=ends_B.int(),
                seq_lens_cpu_upper_bound=ends_B.int().cpu(),
                num_reqs=len(requests),
                num_actual_tokens=len(slots_N),
                max_query_len=int(lengths_B.max()),
                max_seq_len=int(ends_B.max()),
                block_table_tensor=metadata.block_table_tensor[requests],
                slot_mapping=slots_N,
            ),
            sampling_metadata=None,
        )
        self.row_of_slot_S[slots_N] = -1
        return True


RUNNER = "vllm.v1.worker.gpu_model_runner.GPUModelRunner"
BY_WRAPPED = {
    f"{RUNNER}._sample": (
        "it verifies in a step that has no drafts, which takes longer than sampling",
        "self, logits, spec_decode_metadata",
    ),
    f"{RUNNER}.propose_draft_token_ids": (
        "it runs the drafter's first forward pass in a step that drafts nothing, to keep its KV cache without holes",
        "self, scheduler_output, sampled_token_ids, sampling_metadata, hidden_states, sample_hidden_states, "
        "aux_hidden_states, spec_decode_metadata, common_attn_metadata, slot_mappings",
    ),
    f"{RUNNER}.take_draft_token_ids": (
        "it hands over empty drafts, and for that waits for Python's lock, which vLLM's output thread then has",
        "self",
    ),
}
USED = {
    "vllm.v1.spec_decode.llm_base_proposer.SpecDecodeBaseProposer.propose": (
        "self, num_speculative_tokens, target_token_ids, target_positions, target_hidden_states, next_token_ids, "
        "token_indices_to_sample, common_attn_metadata, sampling_metadata, ..."
    ),
    "vllm.v1.attention.backend.CommonAttentionMetadata": (
        "query_start_loc, query_start_loc_cpu, seq_lens, num_reqs, num_actual_tokens, max_query_len, max_seq_len, "
        "block_table_tensor, slot_mapping, ..."
    ),
}

IDLE_DRAFTER = [
    Patch(
        name,
        reason,
        when="on the runner's own object on a CPU, for drafters with weights",
        unneeded="draft length 0 costs what an engine without a drafter costs",
        apply=IdleDrafter,
        shown_by="tests/integration/test_idle_drafter.py"
        "::test_an_idle_drafter_runs_no_forward_and_drafts_afterwards_as_if_it_had_run",
        relies_on={name: parameters, **USED},
    )
    for name, (reason, parameters) in BY_WRAPPED.items()
]
