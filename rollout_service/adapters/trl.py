"""TRL's trainers with a push of this service in place of their NCCL transfer of weights. Needs trl, and no GPU.

GRPOTrainer, and every other trainer with `vllm_mode="server"`, before it is made:

    from rollout_service.adapters.trl import use_pushes
    use_pushes(model)

AsyncGRPOTrainer:

    from rollout_service.adapters.trl import Pushes
    trainer = AsyncGRPOTrainer(model, ..., weight_transfer=Pushes(endpoint, model))

`model` is what the trainer gets as its model: a folder or a Hugging Face name. Generation stays TRL's own.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from rollout_service.client import RolloutClient


class Pushes:
    """TRL's `WeightTransferProtocol`: every update is one push of the whole policy, as the next version.

    Raises RolloutError when the service refuses a push; the old weights then stay in service.
    """

    def __init__(self, endpoint: str, model: str, token: str | None = None):
        self.endpoint, self.model, self.token = endpoint, model, token
        self.client: RolloutClient | None = None

    def init_weight_transfer(self) -> None:
        """Connect. Raises EndpointError and RolloutError when no service answers at the endpoint."""
        self.client = RolloutClient(self.endpoint, self.token)
        self.client.weights()

    def pause(self) -> None:
        """Nothing: an engine pauses by itself while it loads a push."""

    def resume(self) -> None:
        """Nothing, as `pause`."""

    def send_weights(self, iterator: Iterable[tuple[str, Tensor]]) -> None:
        """Push the trainer's parameters, by their names in transformers. Returns when every engine holds them."""
        assert self.client is not None, "init_weight_transfer comes first"
        service = self.client.weights()
        dtype = getattr(torch, service.dtype)
        # A trainer that shards its model frees a parameter once the next one is asked for.
        named = {name: tensor.detach().to("cpu", dtype, copy=True) for name, tensor in iterator}
        self.client.push_weights("policy", checkpoint_tensors(self.model, named), service.policy.version + 1)

    def destroy(self) -> None:
        if self.client is not None:
            self.client.http.close()
            self.client = None


def checkpoint_tensors(model: str, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of a transformers model under the names of its checkpoint.

    The names differ where transformers fuses a checkpoint's tensors, as it does with a mixture's experts.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    return revert_weight_conversion(skeleton, named)


def use_pushes(model: str, token: str | None = None) -> None:
    """Let TRL's trainers that are made from now on push their weights to the service that they generate with.

    Their `VLLMClient` gets a subclass that replaces the transfer of weights, and nothing else. The service's address is
    theirs: `vllm_server_base_url`.
    """
    from trl.generation import vllm_generation

    class PushingClient(vllm_generation.VLLMClient):
        def init_communicator(self, device: object = 0) -> None:
            self.pushes = Pushes(self.base_url, model, token)
            self.pushes.init_weight_transfer()

        def _start_weight_update(self) -> None:
            self.collected: dict[str, Tensor] = {}

        def update_named_params(self, metadata: object, named_params: Iterator[tuple[str, Tensor]]) -> None:
            if self._updating_weights:  # inside `with client.weight_update()`, which may send parts
                self.collected |= {name: tensor.detach().to("cpu", copy=True) for name, tensor in named_params}
            else:
                self.pushes.send_weights(named_params)

        def _finish_weight_update(self) -> None:
            self.pushes.send_weights(self.collected.items())

        def close_communicator(self) -> None:
            self.pushes.destroy()

    vllm_generation.VLLMClient = PushingClient
