"""Rules of an update of several calls: which tensors it holds, and in which dtypes, from the checkpoint in service."""

from pathlib import Path

from drafters.files.checkpoint_folder import TensorSpec, checkpoint_names, read_config
from rollout_service.engine.update_file import HEAD, TensorRules
from rollout_service.protocol import WeightsOf
from rollout_service.weights.manifest import DTYPES, FLOATING
from rollout_service.weights.versions import WeightStore


def rules_of(store: WeightStore, of: WeightsOf) -> TensorRules:
    """Floating-point tensors have the service's dtype, whatever the checkpoint's is, as in every push."""
    weights_set = store.sets[of]
    dtype = DTYPES[weights_set.dtype]
    expected = {
        name: TensorSpec(shape, dtype if given in FLOATING else given)
        for name, (shape, given) in weights_set.expected.items()
    }
    folder = store.policy_folder if of == "policy" else store.drafter_folder
    assert folder is not None
    others = {name for other, weights in store.sets.items() if other != of for name in weights.expected}
    if of == "drafter":  # what its checkpoint holds besides, such as the policy's embedding
        others |= {HEAD, *checkpoint_names(folder)}
    return TensorRules(of, expected, frozenset(others - expected.keys()), HEAD in expected and ties_its_head(folder))


def ties_its_head(folder: Path) -> bool:
    """Whether the model's head is its embedding, although the checkpoint lists both. `checkpoint_specs` has left out a
    head that config.json says is tied, so only the model's default is asked."""
    if "tie_word_embeddings" in read_config(folder):
        return False
    from transformers import AutoConfig

    import drafters.latent_moe  # noqa: F401

    return bool(AutoConfig.from_pretrained(folder).get_text_config().tie_word_embeddings)
