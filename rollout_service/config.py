"""Configuration of the service: what is served, by how many engines, with which drafter, and where it listens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_settings import CliImplicitFlag

from drafters.files.home import in_home
from drafters.registry import DrafterConfig, make_drafter
from drafters.settings import Section
from rollout_service import certificates
from rollout_service.bearer_token import VARIABLE, WithAdminToken
from rollout_service.vllm_arguments import check_arguments
from rollout_service.vllm_parsers import check_parser

Engines = Annotated[int, Field(ge=1)] | Literal["all"]
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class EngineConfig(Section):
    """One engine: a vLLM AsyncLLM in a Ray actor."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if torch finds a GPU, else cpu"""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """dtype of the weights and activations; pushed tensors must have it. With float32, log-probabilities are exact to
    1e-5"""
    max_model_len: int = Field(default=4096, ge=16)
    """the context: most tokens of a prompt and its response together; a drafter needs draft_tokens + 1 of them"""
    max_num_seqs: int = Field(default=64, ge=1)
    """completions that one engine runs at the same time; further ones wait"""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """size of the KV cache, in GiB. When not given: 1 on a CPU, and on a GPU what gpu_memory_utilization leaves"""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """on cuda only: share of each GPU's memory that the engine may use"""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """number of GPUs that each engine uses; on a CPU, of processes that share its cores, which is slower"""
    cores: int = Field(default=0, ge=0)
    """on cpu only: number of cores that each engine uses; 0 divides the machine's cores equally"""
    enforce_eager: bool | None = None
    """true turns compilation off. On a CPU it is always off, because a compiled graph might keep old weights"""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """vLLM's seed; engine i gets seed + i"""
    routed_experts: CliImplicitFlag[bool] = False
    """record which experts the policy's routers choose, for requests that ask for them; for mixtures of experts only"""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """further vLLM engine arguments, passed on unchanged"""

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

    @model_validator(mode="after")
    def records_in_the_prefix_cache(self) -> "EngineConfig":
        if self.routed_experts and self.vllm.get("enable_prefix_caching") is False:
            raise ValueError(
                "routed_experts: vLLM keeps them beside its prefix cache; leave out vllm.enable_prefix_caching = false"
            )
        return self

    def check_device(self, device: str) -> None:
        """Raises ValueError for a field that has no effect on this device, `cpu` or `cuda`."""
        of_others = ["cores"] if device == "cuda" else ["gpu_memory_utilization"]
        self.refuse_unread(of_others, f"device = {device!r}")


class WeightsConfig(Section):
    """What happens to running completions when new weights arrive."""

    renamed: ClassVar[Mapping[str, str]] = {"policy": "running"}

    running: Literal["keep", "drain", "restart"] = "keep"
    """what happens to running completions when new weights arrive. keep: they pause, then continue with the new
    weights; drain: they finish first; restart: they are aborted and generated again"""
    kv_cache: Literal["recompute", "keep"] = "recompute"
    """with running = "keep": what happens to the keys and values of earlier tokens. recompute: they are computed again
    with the new weights, so that log-probabilities stay exact; keep: they stay, so that the pause is shorter"""

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
    """most groups in the queue that are not acknowledged; further prompts are answered with 429"""
    disk_mib: int = Field(default=4096, ge=1)
    """largest size of the queue's database, in MiB; when it is nearly full, prompts are answered with 507"""


class AlarmConfig(Section):
    """When to raise an alarm because speculation became slow: a log line, a metric, and a field of /v1/speculation."""

    acceptance_fall: float = Field(default=0.2, gt=0, le=1)
    """fraction by which the acceptance rate of first drafts may fall after a push without an alarm"""
    draft_steps: int = Field(default=500, ge=1)
    """draft steps to count for a pair of versions before its acceptance is judged"""


class OpenAIConfig(Section):
    """What vLLM's handlers make of chats on OpenAI's routes. The chat template is also that of `messages` in groups."""

    tool_parser: str | None = None
    """name of vLLM's parser of the policy's tool calls, such as hermes or qwen3_coder (vLLM's --tool-call-parser)"""
    auto_tool_choice: bool = False
    """answer requests with tools, where the policy itself decides whether to call one (vLLM's
    --enable-auto-tool-choice); needs tool_parser"""
    reasoning_parser: str | None = None
    """name of vLLM's parser that separates the policy's reasoning from its answer, such as qwen3 (vLLM's
    --reasoning-parser)"""
    chat_template: str | None = None
    """file of a Jinja chat template that replaces the checkpoint's, or the template itself"""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """what chat templates get in addition, such as {enable_thinking = false}; a chat request may override it (vLLM's
    --default-chat-template-kwargs)"""

    @field_validator("tool_parser", "reasoning_parser")
    @classmethod
    def known_to_vllm(cls, name: str | None, info: ValidationInfo) -> str | None:
        if name is not None:
            check_parser("tool_parser" if info.field_name == "tool_parser" else "reasoning_parser", name)
        return name

    @field_validator("chat_template")
    @classmethod
    def read_here(cls, given: str | None) -> str | None:
        """The template's text, because engines may run on machines that do not have the file."""
        if given is None or "{" in given:
            return given
        try:
            text = in_home(Path(given)).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{given}: cannot be read, and is no Jinja template either: {error}") from None
        if "{" not in text:
            raise ValueError(f"{given}: holds no Jinja template")
        return text

    @model_validator(mode="after")
    def parses_what_it_offers(self) -> "OpenAIConfig":
        if self.auto_tool_choice and self.tool_parser is None:
            raise ValueError("auto_tool_choice: needs a tool_parser, which finds the calls in the policy's text")
        if not self.auto_tool_choice:
            self.refuse_unread(["tool_parser"], "auto_tool_choice = false")
        return self


class CorsConfig(Section):
    """Which web pages of other origins may call the service from a browser. Their preflights need no token."""

    origins: list[str] = Field(default_factory=list)
    """origins such as "https://example.org:8443"; "*" allows all; an empty list allows none"""
    credentials: bool = False
    """let pages send cookies, for a proxy before the service that reads them; the service itself reads none"""

    @field_validator("origins")
    @classmethod
    def are_origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            parts = urlsplit(origin)
            if origin != "*" and (
                parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}"
            ):
                raise ValueError(f'{origin!r} is no origin; write it like "https://example.org", without a path')
        return origins

    @model_validator(mode="after")
    def names_whom_it_trusts(self) -> "CorsConfig":
        if self.credentials and "*" in self.origins:
            raise ValueError('credentials: cannot be given to all origins ("*"); name the origins')
        return self


class TLSConfig(Section):
    """Certificate of the service, for https. Without one it speaks plain http."""

    certificate: Path | None = None
    """PEM file of the certificate, followed by those between it and its authority"""
    key: Path | None = None
    """PEM file of the certificate's private key, without a password"""
    ended_by_proxy: bool = False
    """something in front of the service ends TLS, such as a proxy or an ingress, so the service may speak plain http on
    an address that is not loopback"""

    @model_validator(mode="after")
    def is_a_pair(self) -> "TLSConfig":
        if self.certificate is not None and self.key is not None:
            certificates.check_pair(self.certificate, self.key)
            self.refuse_unread(["ended_by_proxy"], "a certificate of the service itself")
        elif self.certificate is not None:
            raise ValueError("key: a certificate needs the file of its private key")
        elif self.key is not None:
            raise ValueError("certificate: a key needs the file of its certificate")
        return self

    @property
    def scheme(self) -> str:
        return "http" if self.certificate is None else "https"


class ServiceConfig(WithAdminToken, Section):
    """Serve a policy for rollouts: a fleet of vLLM engines behind one HTTP endpoint."""

    model: str
    """the policy: a folder or a Hugging Face name"""
    name: str | None = None
    """the policy's name in requests; when not given, the last part of `model`"""
    engines: Engines = 1
    """number of engines; all: as many as fit on the machine or in the joined cluster, also when nodes join or leave"""
    engine_timeout: float = Field(default=60.0, ge=1.0)
    """seconds that an engine in service may be silent: then it is killed and started again, and its groups are
    generated elsewhere. While it loads weights, it has a second more for each 100 MB"""
    engine: EngineConfig = EngineConfig()
    drafter: DrafterConfig = DrafterConfig()
    alarms: AlarmConfig = AlarmConfig()
    host: str = "127.0.0.1"
    """address to listen on; every address except loopback needs a token, and TLS"""
    port: int = Field(default=8000, ge=0, le=65535)
    """port to listen on; 0 takes any free port"""
    tls: TLSConfig = TLSConfig()
    state: Path | None = None
    """folder that keeps the batch queue and the weights in service, so that a restarted service continues with them;
    without it they are only in memory"""
    queue: QueueConfig = QueueConfig()
    openai: OpenAIConfig = OpenAIConfig()
    cors: CorsConfig = CorsConfig()
    weights: WeightsConfig = WeightsConfig()
    body_limit_mib: int = Field(default=64, ge=1)
    """largest request body, in MiB; pushed weights are limited by the size of the model instead"""
    access_log: Literal["off", "text", "json"] = "off"
    """a line on stderr for each request when its answer ends: as text, or as JSON"""
    engine_logs: bool = False
    """show the engines' own log lines; otherwise Ray keeps them in its session folder"""
    ray_address: str | None = None
    """an existing Ray cluster to join (`auto`, or ray://host:port); when not given, a local one is started"""
    ray_timeout: float = Field(default=60.0, ge=0.0)
    """with ray_address: seconds in which the cluster must have room for all engines; give minutes to one that grows on
    demand, or that others use"""

    @model_validator(mode="after")
    def reachable_only_with_token(self) -> "ServiceConfig":
        if self.host not in LOOPBACK and self.token is None:
            raise ValueError(
                f"token: listening on {self.host} needs a token; set token, token_file or the environment variable "
                f'{VARIABLE}, or listen on host = "127.0.0.1"'
            )
        return self

    @model_validator(mode="after")
    def reachable_only_with_tls(self) -> "ServiceConfig":
        if self.host not in LOOPBACK and self.tls.certificate is None and not self.tls.ended_by_proxy:
            raise ValueError(
                f"tls: listening on {self.host} needs TLS; set tls.certificate and tls.key, or tls.ended_by_proxy = "
                'true if something in front of the service ends TLS, or listen on host = "127.0.0.1"'
            )
        return self

    @model_validator(mode="after")
    def waits_only_for_a_cluster(self) -> "ServiceConfig":
        if self.ray_address is None:
            self.refuse_unread(["ray_timeout"], "a Ray cluster of its own, without ray_address")
        return self

    @property
    def first_engines(self) -> int:
        """Number of engines without which the service does not start."""
        return 1 if self.engines == "all" else self.engines

    @model_validator(mode="after")
    def known_drafter(self) -> "ServiceConfig":
        make_drafter(self.drafter).speculative_config()
        return self

    def for_engine(self) -> dict[str, Any]:
        """The fields that an engine's actor needs, as JSON: all of them except those of the front alone."""
        front = {"host", "port", "tls", "token", "token_file", "admin_token", "admin_token_file", "cors", "access_log"}
        return self.model_dump(mode="json", exclude=front)

    @property
    def context_limit(self) -> int:
        """Most tokens of a prompt and its response together. A draft step looks k + 1 positions past the last token,
        and no drafter may read past the engine's context."""
        return self.engine.max_model_len - (self.drafter.draft_tokens + 1 if self.drafter.drafts else 0)

    @property
    def served_name(self) -> str:
        return self.name or self.model.rstrip("/").rsplit("/", 1)[-1]
