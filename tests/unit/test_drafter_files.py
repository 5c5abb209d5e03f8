"""Published drafter checkpoints load into the learners, and are pushed under the names that they came with."""

import json

import pytest
import torch
from rl_toys import character_tokenizer, llama, qwen3_next
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from drafters.files.checkpoint_folder import read_tensors
from drafters.inspect import describe
from drafters.learners.eagle3_head import Eagle3Head, default_layers
from drafters.learners.factory import load_learner, new_learner
from drafters.learners.learner import read_policy
from drafters.learners.mtp_head import MTPHead
from drafters.learners.small_model import DraftModel
from drafters.registry import HeadShape

VOCABULARY = [0, 2, 3, 5, 8, 13]
TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])


@pytest.fixture(scope="module")
def policy():
    return llama()


@pytest.fixture(scope="module")
def head(policy):
    torch.manual_seed(3)
    return Eagle3Head.from_policy(policy, (0, 1, 2), VOCABULARY)


def llama_block(policy) -> dict:
    keys = ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "rms_norm_eps", "head_dim")
    return {key: getattr(policy.config, key) for key in keys} | {
        "model_type": "llama", "intermediate_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 128,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip


def published(head, policy, folder, layout, **more):
    """`head` as SpecForge or speculators write it: with the mask of draftable tokens and a copy of the embedding."""
    folder.mkdir()
    mask = torch.zeros(policy.config.vocab_size, dtype=torch.bool)
    mask[VOCABULARY] = True
    tensors = head.checkpoint() | {"t2d": mask, "embed_tokens.weight": policy.get_input_embeddings().weight.detach()}
    ids, drafted = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}, {"draft_vocab_size": len(VOCABULARY)}
    if layout == "SpecForge":
        names = {"architectures": ["LlamaForCausalLMEagle3"], "eagle_config": ids | {"use_aux_hidden_state": True}}
        config = llama_block(policy) | names | drafted
    else:
        tensors = {name.replace("midlayer.", "layers.0."): t for name, t in tensors.items()}
        config = ids | drafted | {
            "architectures": ["Eagle3DraftModel"], "speculators_model_type": "eagle3", "norm_before_residual": False,
            "target_hidden_size": policy.config.hidden_size, "transformer_layer_config": llama_block(policy),
            "speculators_config": {"algorithm": "eagle3", "proposal_methods": [{"speculative_tokens": 3}]},
        }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | more))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def drafts(learner, policy):
    return learner.draft_logprobs(TOKENS, read_policy(policy, TOKENS, learner.policy_layers), 2)


@pytest.mark.parametrize("layout", ["SpecForge", "speculators"])
def test_a_published_eagle3_head_drafts_as_it_did_and_keeps_its_names(layout, head, policy, tmp_path):
    folder = published(head, policy, tmp_path / "head", layout)
    # The file's intermediate size differs from this project's default, and the file's holds.
    loaded = load_learner("eagle3", folder, policy)
    assert loaded.policy_layers == (0, 1, 2)
    for mine, theirs in zip(drafts(loaded, policy), drafts(head, policy), strict=True):
        torch.testing.assert_close(mine, theirs)
    pushed, file = loaded.checkpoint(), load_file(folder / "model.safetensors")
    assert pushed.keys() == file.keys() - {"embed_tokens.weight"}, "an update must fit the engine started with it"
    assert all(torch.equal(pushed[name], file[name]) for name in pushed)
    assert describe(folder)["layout"] == layout
    loaded.write(tmp_path / "again", folder, torch.float32)
    again = load_learner("eagle3", tmp_path / "again", policy)
    for mine, theirs in zip(drafts(again, policy), drafts(head, policy), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_heads_of_speculators_normalise_before_the_residual_by_default(head, policy, tmp_path):
    loaded = load_learner("eagle3", published(head, policy, tmp_path / "a", "speculators"), policy)
    folder = published(head, policy, tmp_path / "b", "speculators")
    config = json.loads((folder / "config.json").read_text())
    del config["norm_before_residual"]
    (folder / "config.json").write_text(json.dumps(config))
    other = load_learner("eagle3", folder, policy)
    assert (loaded.config.norm_before_residual, other.config.norm_before_residual) == (False, True)
    assert (drafts(loaded, policy)[0] - drafts(other, policy)[0]).nan_to_num().abs().max() > 1e-4


def test_a_head_with_its_own_embedding_uses_it(head, policy, tmp_path):
    folder = published(head, policy, tmp_path / "head", "SpecForge")
    tensors = load_file(folder / "model.safetensors")
    tensors["embed_tokens.weight"] += 1.0
    save_file(tensors, folder / "model.safetensors")
    loaded = load_learner("eagle3", folder, policy)
    assert (drafts(loaded, policy)[0] - drafts(head, policy)[0]).nan_to_num().abs().max() > 1e-3
    assert "embed_tokens.weight" not in loaded.checkpoint()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"hidden_size": 48, "head_dim": 12}, "was made for a policy of hidden_size 48"),
        ({"num_hidden_layers": 2}, "one Llama layer"),
        ({"logit_scale": 2.0}, "logit_scale"),
        ({"draft_vocab_size": 7}, "size mismatch"),
    ],
)
def test_a_head_that_does_not_fit_is_refused_with_a_reason(more, message, head, policy, tmp_path):
    folder = published(head, policy, tmp_path / "head", "SpecForge", **more)
    if "draft_vocab_size" in more:
        tensors = load_file(folder / "model.safetensors") | {"d2t": torch.arange(7)}
        save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_learner("eagle3", folder, policy)


def test_an_mtp_head_inside_a_policys_own_files_is_found_and_a_new_one_replaces_it(tmp_path):
    policy = qwen3_next()
    head = MTPHead.from_policy(policy)
    policy.save_pretrained(tmp_path / "policy")
    file = tmp_path / "policy" / "model.safetensors"
    of_policy = load_file(file)
    save_file(of_policy | head.checkpoint(), file, metadata={"format": "pt"})
    loaded = load_learner("mtp", tmp_path / "policy", policy)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), head.parameters(), strict=True))

    loaded.fc.weight.data += 1.0
    loaded.write(tmp_path / "out", tmp_path / "policy", torch.float32)
    tensors = read_tensors(tmp_path / "out")
    assert torch.equal(tensors["mtp.fc.weight"], head.fc.weight + 1.0)
    assert all(torch.equal(tensors[name], of_policy[name]) for name in of_policy)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["mtp.fc.weight"] == "mtp.safetensors"
    assert not any(name.startswith("mtp.") for name in load_file(tmp_path / "out" / "model.safetensors"))
    assert load_file(file).keys() == (of_policy | head.checkpoint()).keys(), "the policy's own folder stays unchanged"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_nextn_predict_layers == 1


def test_other_files_beside_the_weights_are_neither_read_nor_copied(tmp_path):
    policy, out = qwen3_next(), tmp_path / "out"
    policy.save_pretrained(tmp_path / "policy")
    of_policy = load_file(tmp_path / "policy" / "model.safetensors")
    save_file({"mtp.fc.weight": torch.zeros(2, 2)}, tmp_path / "policy" / "adapter_model.safetensors")
    assert read_tensors(tmp_path / "policy").keys() == of_policy.keys()
    head = MTPHead.from_policy(policy)
    head.write(out, tmp_path / "policy", torch.float32)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {"model.safetensors", "mtp.safetensors"}
    assert read_tensors(out).keys() == of_policy.keys() | head.checkpoint().keys()


def test_an_eagle3_head_with_a_rotary_buffer_is_loaded(head, policy, tmp_path):
    folder = published(head, policy, tmp_path / "head", "SpecForge")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"midlayer.self_attn.rotary_emb.inv_freq": torch.ones(4)}, folder / "model.safetensors")
    assert load_learner("eagle3", folder, policy).checkpoint().keys() == tensors.keys() - {"embed_tokens.weight"}


def test_a_policy_without_a_head_and_an_architecture_without_one_are_refused(policy, tmp_path):
    qwen3_next().save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="holds no MTP head"):
        load_learner("mtp", tmp_path / "headless", qwen3_next())
    with pytest.raises(ValueError, match="'llama'; train eagle3 or draft_model"):
        new_learner("mtp", policy, HeadShape(), [])


def test_a_draft_model_with_a_tied_head_pushes_no_duplicate(tmp_path):
    model = llama(tied=True)
    model.save_pretrained(tmp_path / "model")
    learner = load_learner("draft_model", tmp_path / "model", model)
    assert learner.checkpoint().keys() == load_file(tmp_path / "model" / "model.safetensors").keys()
    other = DraftModel(llama(seed=1, tied=True))
    other.load_checkpoint(learner.checkpoint())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), learner.parameters(), strict=True))


@pytest.mark.parametrize("make", [llama, lambda: llama(tied=True), qwen3_next])
@pytest.mark.parametrize("kind", ["eagle3", "draft_model"])
def test_a_head_is_made_for_any_policy(kind, make):
    policy = make()
    learner = new_learner(kind, policy, HeadShape(vocabulary_size=8), [[3, 3, 4], [5, 1, 2]])
    logprobs = drafts(learner, policy)[0]
    assert logprobs.shape[-1] == policy.config.vocab_size
    assert torch.isfinite(logprobs[0, 0]).sum() == (8 if kind == "eagle3" else policy.config.vocab_size)
    whole = new_learner(kind, policy, HeadShape(), [])
    assert "d2t" not in whole.checkpoint()
    assert torch.isfinite(drafts(whole, policy)[0]).all()


@pytest.mark.parametrize(("kind", "make"), [("eagle3", llama), ("draft_model", llama), ("mtp", qwen3_next)])
def test_new_and_loaded_drafters_have_no_dropout_in_training(kind, make, tmp_path):
    policy = make()
    policy.save_pretrained(tmp_path / "policy")
    character_tokenizer().save_pretrained(tmp_path / "policy")
    new = new_learner(kind, policy, HeadShape(), [])
    new.write(tmp_path / "drafter", tmp_path / "policy", torch.float32)
    for learner in (new, load_learner(kind, tmp_path / "drafter", policy)):
        assert not any(module.training for module in learner.modules())


def test_default_layers_are_vllms_and_all_different():
    assert default_layers(36) == (2, 18, 33)
    assert all(len(set(default_layers(n))) == 3 for n in range(3, 12))
