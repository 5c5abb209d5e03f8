"""Face of a vLLM worker: what the service switches, asks and tests there, the same for both of vLLM's model runners.

face_v1.py   the runner of a CPU engine
face_v2.py   the runner of a GPU engine

A worker's face is chosen once, when its engine starts. FaceV1 alone can also switch how drafts are sampled and let the
drafter idle. Nobody asks FaceV2 for that (engine/switches.py).
"""

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from drafters.verification import Verification


class Cut(NamedTuple):
    temperature: float
    top_k: int = 0
    top_p: float = 1.0

    def __str__(self) -> str:
        """Example: "temperature 0.8, top-k 8, top-p 0.9"."""
        top_k = f", top-k {self.top_k}" if self.top_k else ""
        return f"temperature {self.temperature:g}{top_k}" + (f", top-p {self.top_p:g}" if self.top_p < 1.0 else "")


class Face(Protocol):
    device_type: str
    """"cpu" or "cuda\""""
    draft_tokens: int
    """the engine's longest draft; 0 without a drafter"""

    @property
    def verifications(self) -> tuple[Verification, ...]:
        """Those that `verify` can run now."""

    def set_verification(self, verification: str) -> None:
        """Verify drafts as `drafter.verification` says, from the next step on."""

    def running(self) -> dict[str, str]:
        """How drafts are sampled and verified now, as read from vLLM's own objects; empty without a drafter.

        Example: `{"draft_sampling": "probabilistic", "verification": "block (own)"}`.
        """

    def sample(self, logits_NV: Tensor, cut: Cut) -> Tensor:
        """A token for each row of float32 logits, drawn by vLLM's sampler of this device: int64 (N,), on the CPU."""

    def verify(
        self,
        target_RKV: Tensor,
        draft_KV: Tensor | None,
        drafts_RK: Tensor,
        temperature: float,
        verification: Verification,
    ) -> Tensor:
        """What vLLM's verification of this device makes of drafts: int64 (R, k + 1), -1 past the end, on the CPU.

        The target's logits are float32 (R, k + 1, V), those of the drafter (k, V) for all requests, or None if the
        drafts are deterministic.
        """

    def check_products(self) -> None:
        """Raises RuntimeError if products of float32 matrices are not exact to float32's precision."""


def face_of(worker: Any) -> Face:
    if worker.use_v2_model_runner:
        from rollout_service.vllm_plugin.face_v2 import FaceV2

        return FaceV2(worker)
    from rollout_service.vllm_plugin.face_v1 import FaceV1

    return FaceV1(worker)
