"""The run of `drafters formats` after its configuration is read: load, measure, print, write.

output/
  formats.json          a row for each format, on random vectors
  formats.png           QSNR by bits
  sweeps.png            what one other size changes
  layers.json, .png     with a model: QSNR by matrix
  acceptance.json       with a policy: predicted acceptance by drafter and format
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, TypeAdapter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

import drafters.latent_moe  # noqa: F401  (which transformers then knows)
from drafters.chat import chat_text
from drafters.devices import choose_device
from drafters.exploration import plots, tables
from drafters.exploration.acceptance import AcceptanceRow, acceptance_rows, self_drafter
from drafters.exploration.candidates import NAMED, grid
from drafters.exploration.config import FormatsConfig
from drafters.exploration.layers import MatrixRow, matrix_rows
from drafters.exploration.rows import FormatRow, mark_frontier, measured_rows
from drafters.exploration.samples import sample_responses
from drafters.files.durable import check_folder
from drafters.files.model_folder import resolve_model
from drafters.learners.factory import load_learner
from drafters.learners.learner import DrafterLearner
from drafters.mx.qsnr import gaussian_vectors
from drafters.prompts import read_prompts
from drafters.training.command import load_policy
from drafters.training.data import read_samples
from drafters.training.samples import Sample

LENGTH = 256
"""elements of a random vector"""


class Exploration:
    """Everything that the configuration names, loaded. Raises ValueError and OSError, which name the field."""

    def __init__(self, config: FormatsConfig, console: Console):
        check_folder(config.output, "output")
        self.config, self.device = config, choose_device(config.device)
        self.formats = [NAMED[name.upper()] for name in config.formats]
        self.model: PreTrainedModel | None = None
        self.policy: PreTrainedModel | None = None
        self.learners: list[DrafterLearner] = []
        with console.status("loading"):
            if config.model is not None:
                self.model, self.texts = self._loaded("model", config.model)
            if config.policy is not None:
                self.policy, self.samples = self._loaded("policy", config.policy)
                folders = [resolve_model(d.model or config.policy, "drafters.model") for d in config.drafters]
                self.learners = [
                    load_learner(drafter.kind, folder, self.policy).to(self.device)
                    for drafter, folder in zip(config.drafters, folders, strict=True)
                ]

    def _loaded(self, field: str, name: str) -> tuple[PreTrainedModel, list[Sample]]:
        """The model, and the samples or prompts that it reads. A prompt is a sample without a response."""
        folder = resolve_model(name, field)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        samples: list[Sample] = []
        if self.config.data is not None:
            samples = read_samples(self.config.data, tokenizer, max_length=self.config.max_length)
        elif self.config.prompts is not None:
            samples = [
                Sample(prompt, [])
                for prompt in read_prompts(
                    tokenizer,
                    self.config.prompts,
                    lambda messages: tokenizer.encode(chat_text(tokenizer, messages), add_special_tokens=False),
                )
            ]
        return load_policy(folder, self.device), samples

    def random_vectors(self, bar: Progress) -> list[FormatRow]:
        vectors = gaussian_vectors(self.config.vectors, LENGTH, self.config.seed).to(self.device)
        candidates = [*NAMED.values(), *grid()]
        rows = measured_rows(vectors, bar.track(candidates, description="formats"))
        mark_frontier(rows)
        return rows

    def layers(self) -> list[MatrixRow]:
        assert self.model is not None
        texts = [sample.prompt + sample.response for sample in self.texts]
        return matrix_rows(self.model, self.formats, self.config.keep, texts)

    def acceptance(self, bar: Progress) -> list[AcceptanceRow]:
        assert self.policy is not None
        config, samples = self.config, self.samples
        if config.data is None:
            samples = sample_responses(
                self.policy, [sample.prompt for sample in samples], bar, tokens=config.tokens,
                response_tokens=config.response_tokens, temperature=config.temperature, seed=config.seed,
            )  # fmt: skip
        drafters = [(None, self_drafter(self.policy)), *zip(config.drafters, self.learners, strict=True)]
        return [
            row
            for drafter, learner in bar.track(drafters, description="drafters")
            for row in acceptance_rows(learner, self.policy, samples, self.formats, config, drafter)
        ]


def explore(config: FormatsConfig) -> None:
    """Measures, prints and writes. Raises ValueError and OSError, which name the field, before any measurement."""
    console = Console()
    transformers_logging.disable_progress_bar()
    if config.threads:
        torch.set_num_threads(config.threads)
    exploration = Exploration(config, console)
    config.output.mkdir(parents=True, exist_ok=True)
    written = ["formats.json", "formats.png", "sweeps.png"]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        rows = exploration.random_vectors(bar)
        _write(config.output / "formats.json", rows)
        plots.plot_formats(config.output / "formats.png", rows)
        plots.plot_sweeps(config.output / "sweeps.png", rows)
        console.print(tables.formats_table(rows), tables.sweeps_table(rows))
        if exploration.model is not None:
            matrices = exploration.layers()
            _write(config.output / "layers.json", matrices)
            plots.plot_layers(config.output / "layers.png", matrices)
            console.print(tables.layers_table(matrices, "weights"))
            if exploration.texts:
                console.print(tables.layers_table(matrices, "activations"))
            written += ["layers.json", "layers.png"]
        if exploration.policy is not None:
            lengths = exploration.acceptance(bar)
            _write(config.output / "acceptance.json", lengths)
            console.print(tables.acceptance_table(lengths))
            written += ["acceptance.json"]
    console.print(f"written to {config.output}: {', '.join(written)}", soft_wrap=True)


def _write(file: Path, rows: Sequence[BaseModel]) -> None:
    """As a JSON list; an infinite QSNR is null."""
    file.write_bytes(TypeAdapter(list[BaseModel]).dump_json(list(rows), indent=1, serialize_as_any=True) + b"\n")
