"""WorkerExtension: the service's own calls to a vLLM worker. vLLM mixes this class into its worker."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch


class WorkerExtension:
    """Methods for `collective_rpc`. vLLM refuses names that its worker already has."""

    reading: Future[tuple[dict[str, torch.Tensor], str]]
    """the update that comes next: its tensors and their checksum"""
    held: dict[bool, dict[str, int]] = {}  # noqa: RUF012
    """by `of_drafter`, what the model of the last update has held since; the other model may share tensors with it"""

    def read_checkpoint_tensors(self, file: str) -> None:
        """Begin to read a safetensors file for `load_checkpoint_tensors`. The step under way continues meanwhile."""
        from rollout_service.tensor_bytes import map_tensors

        pool = ThreadPoolExecutor(1)
        self.reading = pool.submit(map_tensors, Path(file))
        pool.shutdown(wait=False)

    def load_checkpoint_tensors(self, checksum: str, of_drafter: bool) -> dict[str, Any]:
        """Load the file that is being read (checkpoint names) into the running policy or drafter, in place.

        vLLM's layerwise reload packs each layer for its kernel again, so speed stays what it was at the start. Returns
        the checksum of the bytes that were read, and how many of the model's modules hold something else than before.
        Bytes whose checksum is not `checksum` are not loaded.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import reload
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

        from rollout_service.vllm_plugin.weight_digests import held_digests

        worker: Any = self
        model = worker.get_draft_model() if of_drafter else worker.get_model()
        model_config = worker.vllm_config.speculative_config.draft_model_config if of_drafter else worker.model_config
        tensors, received = self.reading.result()
        del self.reading  # and with it the mapping, once it is loaded
        if received != checksum:
            return {"checksum": received, "changed": 0, "modules": 0}
        before = self.held.get(of_drafter) or held_digests(model)
        with torch.no_grad(), set_current_vllm_config(worker.vllm_config):
            reload.initialize_layerwise_reload(model)
            # An MTP update holds the head's own tensors only: the embedding and the output head are the policy's.
            with disable_mtp_completeness_check():
                model.load_weights(iter(tensors.items()))
            reload.finalize_layerwise_reload(model, model_config)
        after = held_digests(model)
        self.held = {of_drafter: after}
        changed = sum(after[name] != before.get(name) for name in after)
        return {"checksum": checksum, "changed": changed, "modules": len(after)}

    def weight_checksums(self) -> dict[str, str]:
        """vLLM's checksums of the policy's tensors, and those of layers whose weight is packed inside its kernel, which
        vLLM's do not see. By rank and name."""
        from rollout_service.vllm_plugin.weight_digests import packed_digests

        worker: Any = self
        prefix = worker._weight_checksum_prefix()
        packed = {f"{prefix}{name}.packed": f"{number:016x}" for name, number in packed_digests(worker.get_model())}
        return worker.compute_weight_checksums() | packed

    def set_draft_sampling(self, draft_sampling: str) -> None:
        """Switch a running drafter between `probabilistic` and `greedy`. Each step is verified as it was drafted."""
        worker: Any = self
        if worker.vllm_config.speculative_config is not None:
            worker.model_runner.drafter._enable_probabilistic_draft_probs = draft_sampling == "probabilistic"

    def let_drafter_idle(self) -> None:
        """From now on draft length zero costs what an engine without a drafter costs. For drafters with weights."""
        from rollout_service.vllm_plugin.idle_drafter import IdleDrafter

        worker: Any = self
        IdleDrafter(worker.model_runner)

    def set_verification(self, verification: str) -> None:
        """Verify drafts with the project's own `standard` or `block` verification. `auto` leaves vLLM's own in place if
        it is right on this platform."""
        from rollout_service.vllm_plugin import verification as own
        from rollout_service.vllm_plugin.patch import APPLIED
        from rollout_service.vllm_plugin.table import STOCK

        if verification == "auto" and own.NAME not in APPLIED:
            function = STOCK[own.NAME]
        else:
            function = own.make_rejection_sample("block" if verification == "block" else "standard")
        own.rejection_sampler().rejection_sample = function

    def replaced_functions(self) -> dict[str, str]:
        """The functions of vLLM that were found wrong in this process and replaced, with the reasons."""
        from rollout_service.vllm_plugin.patch import APPLIED
        from rollout_service.vllm_plugin.table import DEFECTS

        return {patch.name: patch.reason for patch in DEFECTS if patch.name in APPLIED}
