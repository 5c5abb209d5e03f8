"""Configuration of the service: what is served, by how many engines, with which drafter, and where it listens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from drafters.registry import DrafterConfig, make_drafter
from drafters.settings import Section
from rollout_service.bearer_token import VARIABLE, WithToken
from rollout_service.vllm_arguments import check_arguments

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class EngineConfig(Section):
    """One engine: a vLLM AsyncLLM in a Ray actor."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where torch sees one"""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """of the weights and activations; pushed tensors must have it. float32 gives log-probabilities exact to 1e-5"""
    max_model_len: int = Field(default=4096, ge=16)
    """longest prompt and response together, in tokens"""
    max_num_seqs: int = Field(default=64, ge=1)
    """completions that run at the same time in one engine; more wait"""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """size of the KV cache; on a CPU 1 GiB when not given, on a GPU what gpu_memory_utilization leaves"""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """cuda: share of a GPU's memory"""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """cuda: GPUs of one engine"""
    cores: int = Field(default=0, ge=0)
    """cpu: cores of one engine; 0 for an equal share of the machine's"""
    enforce_eager: bool | None = None
    """no compilation; on a CPU always, since a compiled graph might keep old weights"""
    seed: int = Field(default=0, ge=0, lt=2**31)
    vllm: dict[str, Any] = Field(default_factory=dict)
    """further vLLM engine arguments, passed as they are"""

    @field_validator("vllm")
    @classmethod
    def known_and_lossless(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        check_arguments(arguments)
        return arguments

    @model_validator(mode="after")
    def fits_its_device(self) -> "EngineConfig":
        if self.device != "auto":
            self.check_device(self.device)
        return self

    def check_device(self, device: str) -> None:
        """Raises ValueError for a field that has no effect on this device, `cpu` or `cuda`."""
        of_others = ["cores"] if device == "cuda" else ["gpu_memory_utilization", "tensor_parallel_size"]
        self.refuse_unread(of_others, f"device = {device!r}")


class WeightsConfig(Section):
    """What running completions do when new policy weights arrive."""

    renamed: ClassVar[Mapping[str, str]] = {"policy": "running"}

    running: Literal["keep", "drain", "restart"] = "keep"
    """keep: pause, and go on with the new weights; drain: finish first; restart: abort, and generate again"""
    kv_cache: Literal["recompute", "keep"] = "recompute"
    """with running = keep: the keys and values of tokens so far, recomputed with the new weights (so that
    log-probabilities stay exact), or kept (a shorter pause)"""

    @model_validator(mode="after")
    def has_a_cache_to_keep(self) -> "WeightsConfig":
        if self.running != "keep":
            self.refuse_unread(["kv_cache"], f"running = {self.running!r}")
        return self

    @property
    def keeps_cache(self) -> bool:
        return self.kv_cache == "keep"


class QueueConfig(Section):
    """The queue of groups that are generated in the background."""

    capacity: int = Field(default=4096, ge=1)
    """groups in it that are not acknowledged; more are answered with 429"""
    disk_mib: int = Field(default=4096, ge=1)
    """size of its database; prompts are answered with 507 when it is nearly full"""


class AlarmConfig(Section):
    """When speculation that has become slow is loud: a log line, a metric, and a field of GET /v1/speculation."""

    acceptance_fall: float = Field(default=0.2, gt=0, le=1)
    """fraction by which the acceptance rate of first drafts may fall after a push of policy or drafter"""
    draft_steps: int = Field(default=500, ge=1)
    """draft steps that a pair of versions needs before its acceptance is judged"""


class ServiceConfig(WithToken, Section):
    """Serve a policy for rollouts: a fleet of vLLM engines behind one HTTP endpoint."""

    model: str
    """the policy: a folder or a Hugging Face name"""
    name: str | None = None
    """the policy's name in requests; the folder's or the model's own when not given"""
    engines: int = Field(default=1, ge=1)
    """number of engines"""
    engine: EngineConfig = EngineConfig()
    drafter: DrafterConfig = DrafterConfig()
    alarms: AlarmConfig = AlarmConfig()
    host: str = "127.0.0.1"
    """address to listen on; any but a loopback address needs a token"""
    port: int = Field(default=8000, ge=0, le=65535)
    """port to listen on; 0 for any free one"""
    state: Path | None = None
    """folder of the batch queue and the weights in service, from which a service that starts again goes on; without it
    they are in memory alone"""
    queue: QueueConfig = QueueConfig()
    weights: WeightsConfig = WeightsConfig()
    body_limit_mib: int = Field(default=64, ge=1)
    """largest request body, weights excepted (those are limited by the policy's own size)"""
    engine_logs: bool = False
    """show the engines' own log lines; Ray keeps them in its session folder otherwise"""
    ray_address: str | None = None
    """an existing Ray cluster (`auto`, or ray://host:port); a local one is started when not given"""

    @model_validator(mode="after")
    def reachable_only_with_token(self) -> "ServiceConfig":
        if self.host not in LOOPBACK and self.token is None:
            raise ValueError(
                f"token: listening on {self.host} needs a token; set one here, in token_file "
                f'or in {VARIABLE}, or host = "127.0.0.1"'
            )
        return self

    @model_validator(mode="after")
    def known_drafter(self) -> "ServiceConfig":
        make_drafter(self.drafter).speculative_config()
        return self

    def for_engine(self) -> dict[str, Any]:
        """As JSON, what an engine's actor makes its own configuration of: all but where, and for whom, the front
        listens."""
        return self.model_dump(mode="json", exclude={"host", "port", "token", "token_file"})

    @property
    def context_limit(self) -> int:
        """Tokens that prompt and response may have together. A step of speculation looks k + 1 positions past the last
        token, and no drafter may read past the engine's context."""
        return self.engine.max_model_len - (self.drafter.draft_tokens + 1 if self.drafter.drafts else 0)

    @property
    def served_name(self) -> str:
        return self.name or self.model.rstrip("/").rsplit("/", 1)[-1]
