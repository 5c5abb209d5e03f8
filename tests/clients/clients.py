"""The clients that `make test-clients` runs: the script of each, its environment, and the pinned versions."""

from dataclasses import dataclass

from environments import Environment


@dataclass(frozen=True)
class Client:
    name: str
    script: str
    """of this folder; calls the client"""
    environment: Environment | None
    """None: the project's own"""
    seconds: int = 180
    """most that the script may take"""


OPENAI = Environment("openai", ("openai==3.57.0",))
TRL = Environment("trl", ("--editable", ".[cpu]", "trl==1.16.0", "requests==2.34.2", "aiohttp==3.14.5"))
VERIFIERS = Environment("verifiers", ("verifiers==0.4.0", "renderers==0.1.12", "transformers==5.19.0", "uv==0.13.9"))
# The clients below are a part of larger packages. They are installed without most of what the whole package needs: the
# other requirements are what the client imports.
OF_SKYRL = "aiohttp==3.14.5", "orjson==3.13.0", "requests==2.34.2", "loguru==0.7.3", "pybase64==1.5.1"
OF_NEMO_GYM = (
    "aiohttp==3.14.5", "anthropic==0.109.2", "anyio==4.16.0", "fastapi==0.165.0", "httptools==0.9.0", "httpx==0.28.1",
    "hydra-core==1.3.8", "itsdangerous==2.2.0", "openai==2.44.0", "orjson==3.13.0", "pydot==4.0.1", "ray==2.60.0",
    "requests==2.34.2", "rich==15.0.0", "uvicorn==0.54.0", "yappi==1.7.6",
)  # fmt: skip
SKYRL = Environment("skyrl", ("skyrl==0.4.0", *OF_SKYRL), python="3.12", without_torch=True)
NEMO_GYM = Environment("nemo-gym", OF_NEMO_GYM, python="3.13", any_python=("nemo-gym==0.7.0",))
OF_PRIME_RL = "verifiers==0.4.0", "renderers==0.1.12", "tomli==2.5.0", "tomli-w==1.2.0"
PRIME_RL = Environment("prime-rl", OF_PRIME_RL, python="3.12")

CLIENTS = (
    Client("openai", "call_openai.py", OPENAI),
    Client("TRL VLLMClient", "call_trl_client.py", TRL),
    Client("TRL GRPOTrainer", "call_trl_grpo.py", TRL, seconds=600),
    Client("TRL AsyncGRPOTrainer", "call_trl_async.py", TRL, seconds=900),
    Client("prime-rl", "call_prime_rl.py", PRIME_RL),
    Client("verifiers", "call_verifiers.py", VERIFIERS, seconds=300),
    Client("SkyRL", "call_skyrl.py", SKYRL),
    Client("NeMo-Gym", "call_nemo_gym.py", NEMO_GYM),
    Client("vllm bench serve", "call_bench_serve.py", None),
)
