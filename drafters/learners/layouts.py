"""Layouts of published Eagle3 checkpoints, read into the configuration and the tensor names of this project's learner.

    SpecForge, and this project     config.json of a Llama with `draft_vocab_size`; the layer is `midlayer.*`
    speculators                     `speculators_model_type`, the Llama under `transformer_layer_config`; `layers.0.*`

Both layouts may hold `t2d`, a mask of the tokens that can be drafted, and a copy of the policy's `embed_tokens`. A
learner that is loaded here pushes its tensors under the names of its file. So the push fits an engine that was started
with that file.
"""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from drafters.files.checkpoint_folder import read_tensors
from drafters.kinds.eagle3 import read_eagle3_config


def read_eagle3(folder: Path, policy: PreTrainedModel) -> tuple[LlamaConfig, list[int] | None, dict[str, Tensor]]:
    """Configuration, vocabulary (None: the policy's) and tensors of the head in `folder`, in either layout.

    Raises ValueError that names what does not fit the policy or the learner.
    """
    of_policy: Any = policy.config
    config: Any = read_eagle3_config(folder, of_policy.num_hidden_layers)
    for mine, key in ((config.target_hidden_size, "hidden_size"), (config.vocab_size, "vocab_size")):
        if mine != getattr(of_policy, key):
            raise ValueError(f"{folder} was made for a policy of {key} {mine}; this one has {getattr(of_policy, key)}")
    tensors = read_tensors(folder)
    if not tensors:
        raise ValueError(f"{folder} holds no safetensors file; convert the checkpoint first")
    embedding: Any = policy.get_input_embeddings()
    copy = tensors.get("embed_tokens.weight")
    if (
        copy is not None
        and copy.shape == embedding.weight.shape
        and bool((copy.to(embedding.weight.device, embedding.weight.dtype) == embedding.weight).all())
    ):
        del tensors["embed_tokens.weight"]  # vLLM then shares the policy's embedding, and so does the learner
    offsets = tensors.get("d2t")
    if config.draft_vocab_size == config.vocab_size:
        tensors.pop("d2t", None)
        vocabulary = None
    elif offsets is None:
        raise ValueError(f"{folder} drafts {config.draft_vocab_size} tokens, but holds no `d2t` that says which")
    else:
        vocabulary = [i + offset for i, offset in enumerate(offsets.tolist())]
    return config, vocabulary, tensors
