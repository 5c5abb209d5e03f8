"""`drafters formats`: the frontier and the sweeps, formats on a model's layers, and as drafters, on toy models."""

import json
from typing import get_args

import pytest
import torch
from rich.progress import Progress
from rl_toys import EOS, character_tokenizer, llama, nemotron_h, qwen3_next
from rl_toys import sample as drawn

from drafters.cli import main
from drafters.exploration.acceptance import acceptance_rows, quantised, self_drafter
from drafters.exploration.candidates import NAMED, grid
from drafters.exploration.config import FormatName, FormatsConfig, QuantisedDrafter
from drafters.exploration.layers import least_by_layer, matrix_rows
from drafters.exploration.quantised_model import LinearInputs, eager_experts, matrices, quantise_weights
from drafters.exploration.rows import FormatRow, mark_frontier, measured_rows, sweep
from drafters.exploration.samples import sample_responses
from drafters.learners.factory import new_learner
from drafters.mx.encoding import quantise
from drafters.mx.formats import FORMATS
from drafters.mx.qsnr import gaussian_vectors, qsnr
from drafters.registry import HeadShape
from drafters.training.expected_acceptance import predicted_acceptance
from drafters.training.samples import Sample

MX = [NAMED[name] for name in ("MX9", "MX6", "MX4")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a policy, an Eagle3 head, prompts, and samples of the policy."""
    folder = tmp_path_factory.mktemp("exploration")
    policy = llama()
    policy.save_pretrained(folder / "policy")
    character_tokenizer().save_pretrained(folder / "policy")
    torch.manual_seed(0)
    head = new_learner("eagle3", policy, HeadShape(policy_layers=[0, 1, 2]), [])
    (folder / "eagle3").mkdir()
    head.write(folder / "eagle3", folder / "policy")
    prompts = [[3, 4], [5, 6, 7], [8]]
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt_token_ids": {p}}}\n' for p in prompts), encoding="utf-8")
    with (folder / "data.jsonl").open("w", encoding="utf-8") as lines:
        for prompt in prompts:
            (response, _), *_ = drawn(policy, prompt, 1, 12, 1.0, seed=len(prompt))
            lines.write(json.dumps({"prompt_token_ids": prompt, "response_token_ids": response}) + "\n")
    return folder


def samples_of(policy, count=24, length=16):
    return [Sample([3, 4], tokens) for tokens, _ in drawn(policy, [3, 4], count, length, 1.0, seed=0)]


def test_every_format_of_the_configuration_is_a_candidate():
    assert [name.upper() for name in get_args(FormatName)] == list(NAMED)


def test_the_grid_has_each_format_once_and_no_named_one():
    sizes = [(c.block.k1, c.block.k2, c.block.d2, c.block.m) for c in grid()]
    assert len(set(sizes)) == len(sizes) > 180
    assert not {(f.k1, f.k2, f.d2, f.m) for f in FORMATS.values()} & set(sizes)


def test_the_frontier_has_the_formats_that_none_beats_with_as_many_bits():
    points = [("a", 4, 16.0), ("b", 4, 15.0), ("c", 5, 16.0), ("d", 5, 20.0), ("e", 3, 9.0), ("f", 9, 19.0)]
    rows = [FormatRow(name=name, bits=bits, qsnr=db) for name, bits, db in points]
    mark_frontier(rows)
    assert [row.name for row in rows if row.frontier] == ["a", "d", "e"]


def test_sweeps_change_one_size():
    rows = measured_rows(gaussian_vectors(2, 64, seed=0), [*NAMED.values(), *grid()])
    mx6 = next(row for row in rows if row.name == "MX6")
    for field, values in (("d2", [0, 1, 2]), ("k2", [1, 2, 4, 8]), ("k1", [8, 16, 32, 64, 128])):
        swept = sweep(rows, mx6, field)
        assert [getattr(row, field) for row in swept] == values
        assert mx6 in swept
        assert {row.m for row in swept} == {4}
    assert (sweep(rows, mx6, "d2")[0].k2, sweep(rows, mx6, "d2")[0].bits) == (None, 5.5)


def test_the_matrices_are_linear_layers_and_experts_without_gates_embeddings_and_what_is_kept():
    names = set(matrices(qwen3_next(), keep=["lm_head"]))
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert "model.layers.1.self_attn.q_proj" in names
    assert not [name for name in names if "gate" in name.split(".") or "shared_expert_gate" in name]
    assert not names & {"lm_head", "model.embed_tokens"}
    assert set(matrices(qwen3_next())) == names | {"lm_head"}
    assert set(matrices(qwen3_next(), keep=["self_attn"])) == {n for n in names | {"lm_head"} if "self_attn" not in n}
    assert "model.layers.1.mixer.experts.up_proj" in matrices(nemotron_h())


@pytest.mark.parametrize("make", [llama, qwen3_next])
def test_quantised_weights_are_in_the_format_and_all_others_as_they_were(make):
    policy, other = make(), make()
    quantise_weights(policy, MX[2].quantise, keep=["lm_head"])
    changed = matrices(policy, keep=["lm_head"])
    for (name, weight), before in zip(policy.named_parameters(), other.parameters(), strict=True):
        in_format = any(weight is matrix for matrix in changed.values())
        assert torch.equal(weight, quantise(before, FORMATS["MX4"]) if in_format else before), name


@pytest.mark.parametrize("make", [llama, qwen3_next, nemotron_h])
def test_what_matrices_are_multiplied_with_is_seen_and_may_be_replaced(make):
    policy, tokens, seen = make(), torch.tensor([[3, 4, 5, 6, 7]]), {}
    weights = matrices(policy)
    with torch.no_grad():
        before = policy(input_ids=tokens).logits
        eager_experts(policy)

        def see(name, x):
            seen[name] = x
            return x

        with LinearInputs(weights, see):
            torch.testing.assert_close(policy(input_ids=tokens).logits, before)
        assert set(seen) == set(weights)
        assert all(seen[name].shape[-1] == weight.shape[-1] for name, weight in weights.items())
        with LinearInputs(weights, lambda _, x: x * 0):
            assert not policy(input_ids=tokens).logits.any()


def test_the_noise_of_each_matrix_is_that_of_its_weights_and_of_all_it_reads():
    policy, texts = qwen3_next(), [[3, 4, 5], [6, 7], [8, 9, 10], [11]]
    rows = {row.name: row for row in matrix_rows(policy, MX, [], texts)}
    name = "model.layers.1.self_attn.q_proj"
    weight = matrices(policy)[name]
    assert rows[name].weights["MX6"] == pytest.approx(qsnr(weight, quantise(weight, FORMATS["MX6"])))
    read = []
    policy.get_submodule(name).register_forward_pre_hook(lambda _, args: read.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for text in texts:
            policy(input_ids=torch.tensor([text]))
    together = torch.cat(read)
    assert len(together) == 9
    assert rows[name].activations["MX6"] == pytest.approx(qsnr(together, quantise(together, FORMATS["MX6"])), abs=1e-3)
    least = least_by_layer(rows.values(), "weights")
    assert list(least) == ["0", "1", "lm_head"]
    assert least["1"]["MX4"] == min(row.weights["MX4"] for row in rows.values() if row.layer == "1")
    assert not matrix_rows(policy, MX, [], [])[0].activations


@pytest.mark.parametrize("make", [llama, qwen3_next])
def test_a_policy_drafts_for_itself_and_loses_by_the_bits_that_it_lacks(make):
    """Probabilistic drafts of the same weights are always accepted."""
    policy, config = make(), FormatsConfig(policy="p", data=__file__, formats=["mx9", "mx6", "mx4"])
    rows = list(acceptance_rows(self_drafter(policy), policy, samples_of(policy), MX, config, None))
    by = {(row.format, row.draft_sampling): row.acceptance_length for row in rows}
    assert by[None, "probabilistic"] == pytest.approx(4.0, abs=1e-4)
    assert by[None, "greedy"] < 3.5
    lengths = [by[name, "probabilistic"] for name in (None, "MX9", "MX6", "MX4")]
    assert lengths == sorted(lengths, reverse=True)
    assert 1.5 < by["MX4", "probabilistic"] < 3.95
    assert by["MX9", "greedy"] == pytest.approx(by[None, "greedy"], rel=0.02)


def test_quantised_activations_cost_acceptance_too():
    policy, config = llama(), FormatsConfig(policy="p", data=__file__, activations=True)
    rows = list(acceptance_rows(self_drafter(policy), policy, samples_of(policy), MX[2:], config, None))
    assert [row.activations for row in rows] == [False, False, True, True]
    weights_only = predicted_acceptance(
        quantised(self_drafter(policy), MX[2], ["lm_head"]), policy, samples_of(policy), 3
    )
    assert 1.2 < rows[2].acceptance_length < 1 + sum(weights_only) - 0.05


@pytest.mark.parametrize("kind", ["eagle3", "mtp", "draft_model"])
def test_a_trained_drafter_is_copied_before_it_is_quantised(kind):
    policy, config = qwen3_next(first_layer="full_attention"), FormatsConfig(policy="p", data=__file__)
    shape = HeadShape(policy_layers=[0, 1, 2]) if kind == "eagle3" else HeadShape()
    learner = new_learner(kind, policy, shape, [])
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    rows = list(acceptance_rows(learner, policy, samples_of(policy), MX[2:], config, QuantisedDrafter(kind=kind)))
    assert [(row.drafter, row.format) for row in rows] == [(kind, None)] * 2 + [(kind, "MX4")] * 2
    assert rows[0].acceptance_by_position != rows[2].acceptance_by_position
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state_dict().items())


def test_responses_follow_the_policy_and_end_where_it_ends_them():
    """At a low temperature every response is the most likely one. Prompts of unlike lengths are padded on the left."""
    policy, prompts = llama(seed=3), [[3, 4, 5, 6, 7, 8], [9], [10, 11]]
    policy.generation_config.repetition_penalty = 5.0  # of the checkpoint, which would change the distribution
    with Progress(disable=True) as bar:
        found = sample_responses(policy, prompts, bar, tokens=200, response_tokens=10, temperature=0.01, seed=0)
    assert sum(len(sample.response) for sample in found) >= 200
    assert [sample.prompt for sample in found[:4]] == [*prompts, prompts[0]]
    for sample in found[:3]:
        ((expected, _),) = drawn(llama(seed=3), sample.prompt, 1, 10, 0.01, seed=0)
        assert sample.response == expected
        assert EOS not in sample.response[:-1]


def test_the_command_writes_its_files_and_prints_its_tables(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([
            "formats", "--output", str(tmp_path / "out"), "--vectors", "2", "--model", str(folder / "policy"),
            "--policy", str(folder / "policy"), "--prompts", str(folder / "prompts.jsonl"), "--tokens", "20",
            "--response_tokens", "8", "--draft_tokens", "2", "--device", "cpu",
            "--drafters", json.dumps([{"kind": "eagle3", "model": str(folder / "eagle3")}]),
        ])  # fmt: skip
    said = capsys.readouterr().out
    assert end.value.code == 0
    names = ["acceptance.json", "formats.json", "formats.png", "layers.json", "layers.png", "sweeps.png"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names
    assert all((tmp_path / "out" / name).stat().st_size > 500 for name in names)
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "formats.json").read_text())}
    columns = ["name", "k1", "d1", "k2", "d2", "m", "bits", "qsnr", "bound", "frontier"]
    assert list(rows["MX9"]) == columns
    assert [rows["MX9"][name] for name in columns[1:7]] == [16, 8, 2, 1, 7, 9.0]
    assert [rows["MSFP12"][name] for name in columns[1:7]] == [16, 8, None, 0, 3, 4.5]
    assert [rows["E4M3"][name] for name in (*columns[1:7], "bound")] == [None] * 5 + [8.0, None]
    layers = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert {"MX9", "MX6", "MX4"} == set(layers[0]["weights"]) == set(layers[0]["activations"])
    lengths = json.loads((tmp_path / "out" / "acceptance.json").read_text())
    assert [(row["drafter"], row["format"]) for row in lengths[::2]] == [
        (drafter, name) for drafter in ("self", "eagle3") for name in (None, "MX9", "MX6", "MX4")
    ]
    assert {len(row["acceptance_by_position"]) for row in lengths} == {2}
    for title in ("Named formats", "One size changed", "Least QSNR", "Predicted acceptance length, k = 2"):
        assert title in said


def test_recorded_samples_stand_in_for_prompts(folder, tmp_path, capsys):
    flags = ["--policy", str(folder / "policy"), "--data", str(folder / "data.jsonl"), "--vectors", "1"]
    with pytest.raises(SystemExit) as end:
        main(["formats", "--output", str(tmp_path), "--formats", "mx4", "--device", "cpu", *flags])
    assert end.value.code == 0
    lengths = json.loads((tmp_path / "acceptance.json").read_text())
    assert [row["format"] for row in lengths] == [None, None, "MX4", "MX4"]
    assert "activations" not in capsys.readouterr().out


WRONG = {
    "--policy p": "prompts: needed with a policy, which answers them; or give its samples as data",
    "--prompts FILE": "prompts: has no effect with no model and no policy; leave it out",
    "--temperature 0.5": "temperature: has no effect with no policy; leave it out",
    "--activations": "activations: has no effect with no policy; leave it out",
    "--policy p --data FILE --tokens 5": "tokens: has no effect with data; leave it out",
    "--policy p --prompts FILE --max_length 5": "max_length: has no effect with no data; leave it out",
    "--model m --formats mx5": "formats.0: Input should be 'mx9', 'mx6'",
    '--policy p --data FILE --drafters [{"kind":"eagle3"}]': "drafter.model: kind 'eagle3' needs the folder or name",
    '--policy p --data FILE --drafters [{"kind":"ngram"}]': "drafters.0.kind: Input should be 'eagle3', 'mtp' or",
    "--output FILE": "output: FILE is a file; choose a folder",
    "--model /no/such/folder": "model: there is no folder /no/such/folder",
    "--policy /no/such/folder --data FILE": "policy: there is no folder /no/such/folder",
}  # fmt: skip


@pytest.mark.parametrize("flags", WRONG)
def test_a_wrong_configuration_is_reported_before_any_work(flags, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("drafters.exploration.command.Exploration.random_vectors", None)
    file = str(folder / "data.jsonl")
    with pytest.raises(SystemExit) as end:
        main(["formats", "--output", str(tmp_path), *(word.replace("FILE", file) for word in flags.split())])
    assert end.value.code == 2
    assert WRONG[flags].replace("FILE", file) in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
