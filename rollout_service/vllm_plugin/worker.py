"""WorkerExtension: the service's own calls to a vLLM worker. vLLM mixes this class into its worker."""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rollout_service.vllm_plugin.mapped_update import MappedUpdate


class WorkerExtension:
    """Methods for `collective_rpc`. vLLM refuses names that its worker already has."""

    reading: Future[MappedUpdate]
    """the update that comes next"""
    held: dict[bool, dict[str, int]] = {}  # noqa: RUF012
    """by `of_drafter`, what the model of the last update has held since; the other model may share tensors with it"""

    def read_checkpoint_tensors(self, file: str, parts: int = 1) -> None:
        """Begin to read a safetensors file for `load_checkpoint_tensors`. The step under way continues meanwhile.

        `parts`: of how many equal parts the worker checks one, that of its rank.
        """
        worker: Any = self
        pool = ThreadPoolExecutor(1)
        self.reading = pool.submit(MappedUpdate, Path(file), worker.rank % parts, parts, worker.device)
        pool.shutdown(wait=False)

    def checksum_that_was_read(self) -> str:
        """Once the file that is being read is: the checksum of its bytes, or of the worker's part of them."""
        return self.reading.result().checksum

    def load_checkpoint_tensors(self, checksum: str, of_drafter: bool, parts: tuple[str, ...] = ()) -> dict[str, Any]:
        """Load the file that is being read (checkpoint names) into the running policy or drafter, in place.

        vLLM's layerwise reload packs each layer for its kernel again, so speed stays what it was at the start. Returns
        the checksum of the bytes that were read, and how many of the model's modules hold something else than before.
        Bytes whose checksum is not `checksum` are not loaded. `parts` are checksums of parts, if the worker checks one.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import reload
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

        from rollout_service.vllm_plugin.weight_digests import held_digests

        worker: Any = self
        model = worker.get_draft_model() if of_drafter else worker.get_model()
        model_config = worker.vllm_config.speculative_config.draft_model_config if of_drafter else worker.model_config
        update = self.reading.result()
        del self.reading
        if update.checksum != (parts[worker.rank % len(parts)] if parts else checksum):
            return {"checksum": update.checksum, "changed": 0, "modules": 0}
        before = self.held.get(of_drafter) or held_digests(model)
        with torch.no_grad(), set_current_vllm_config(worker.vllm_config):
            reload.initialize_layerwise_reload(model)
            # An MTP update holds the head's own tensors only: the embedding and the output head are the policy's.
            with disable_mtp_completeness_check():
                model.load_weights(iter(update.tensors.items()))
            reload.finalize_layerwise_reload(model, model_config)
        del update  # and with it the mapping
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

    @cached_property
    def face(self) -> Any:
        """What it does with vLLM's model runner, which is chosen once (face.py)."""
        from rollout_service.vllm_plugin.face import face_of

        return face_of(self)

    def check_law(self) -> None:
        """Before anything is generated. Raises RuntimeError if vLLM's sampler or verification is wrong here."""
        from rollout_service.vllm_plugin.law import check_law

        check_law(self.face)

    def law_deviations(self, scale: int) -> dict[str, float]:
        """The standard deviations by which sampler and verification differ from their law, as `law.deviations`."""
        from rollout_service.vllm_plugin.law import deviations

        return deviations(self.face, scale)

    def set_draft_sampling(self, draft_sampling: str) -> None:
        """Switch a running drafter between `probabilistic` and `greedy`, on a CPU."""
        self.face.set_draft_sampling(draft_sampling)

    def let_drafter_idle(self) -> None:
        """From now on draft length zero costs what an engine without a drafter costs. For drafters with weights, on a
        CPU."""
        self.face.let_drafter_idle()

    def return_routed_experts(self) -> None:
        """Let the V1 model runner return what the policy's routers choose. Before anything is generated, with
        `engine.routed_experts`."""
        from rollout_service.vllm_plugin.routed_experts import RoutedExperts

        worker: Any = self
        RoutedExperts(worker.model_runner)

    def set_verification(self, verification: str) -> None:
        """Verify drafts as `drafter.verification` says, from the next step on."""
        self.face.set_verification(verification)

    def running(self) -> dict[str, str]:
        """How drafts are sampled and verified now; empty without a drafter."""
        return self.face.running()

    def replaced_functions(self) -> dict[str, str]:
        """The functions of vLLM that were found wrong in this process and replaced, with the reasons."""
        from rollout_service.vllm_plugin.patch import APPLIED
        from rollout_service.vllm_plugin.table import DEFECTS, DEFECTS_ON_A_GPU

        return {patch.name: patch.reason for patch in (*DEFECTS, *DEFECTS_ON_A_GPU) if patch.name in APPLIED}
