"""What a run directory of the command was made from: model, texts and how they are cut, so that later commands know.

This module reads and writes `RUN/sources.json` and makes a `Study` of it; it knows no arguments and prints nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from wherefrom.errors import DamagedError, InputError, first_line
from wherefrom.files import read_json, write_text
from wherefrom.language import CausalLM
from wherefrom.locks import run_lock
from wherefrom.ranks import join_ranks
from wherefrom.study import Study
from wherefrom.text import as_blocks, as_documents, load_model, load_tokenizer, local_path, read_texts

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SOURCES = "sources.json"
_FORMAT = 1
_AGAIN = "Delete it and run `wherefrom fit` again; it finds the factors that are there."


@dataclass(frozen=True)
class TextSource:
    """Where sequences come from, and how texts are turned into them."""

    source: str
    split: str
    column: str | None
    unit: Literal["documents", "blocks"]
    length: int

    def sequences(self, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Read and tokenise the texts."""
        texts = read_texts(self.source, split=self.split, column=self.column)
        cut = as_documents if self.unit == "documents" else as_blocks
        return cut(texts, tokenizer, self.length)


@dataclass(frozen=True)
class RunSources:
    """What a run directory was made from: `RUN/sources.json`."""

    model: str
    layers: list[str] | None
    train: TextSource
    empirical: bool
    seed: int
    queries: Mapping[str, TextSource]

    @classmethod
    def load(cls, run: Path) -> RunSources:
        """Read what `fit` wrote.

        Raises:
            InputError: there is nothing.
            DamagedError: it cannot be read.
        """
        file = checked_run(run) / SOURCES
        if not file.exists():
            raise InputError(f"{run} is not a run directory: it has no {SOURCES}. Start with: wherefrom fit {run} ...")
        found = read_json(file, _AGAIN)
        if found.pop("format", None) != _FORMAT:
            raise DamagedError(f"{file} is another version's. {_AGAIN}")
        try:
            queries = {name: TextSource(**each) for name, each in found.pop("queries").items()}
            return cls(train=TextSource(**found.pop("train")), queries=queries, **found)
        except (KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{file} cannot be read ({error}). {_AGAIN}") from error

    def save(self, run: Path) -> None:
        """Write the file; queries that other commands have noted are kept."""
        with run_lock(run):
            known = RunSources.load(run).queries if (run / SOURCES).exists() else {}
            content = {"format": _FORMAT, **asdict(replace(self, queries={**known, **self.queries}))}
            write_text(run / SOURCES, json.dumps(content, indent=1) + "\n")

    def study(
        self, run: Path, device: str, memory_budget: float | None
    ) -> tuple[Study[dict[str, torch.Tensor]], PreTrainedTokenizerBase]:
        """Load model, tokenizer and training sequences."""
        tokenizer = load_tokenizer(self.model)
        model = load_model(self.model)
        torch.nn.Module.to(model, _device(device))
        train = self.train.sequences(tokenizer)
        return Study(run, model, CausalLM(self.layers), train=train, memory_budget=memory_budget), tokenizer

    def sequences(self, run: Path, name: str) -> tuple[Dataset, Dataset, PreTrainedTokenizerBase]:
        """The sequences behind the scores of a name: queries, training set, and what tokenised them."""
        if name not in self.queries:
            raise InputError(
                f"{run / SOURCES} does not say which queries {name!r} are of: score with `wherefrom score`."
            )
        tokenizer = load_tokenizer(self.model)
        queries, train = (each.sequences(tokenizer) for each in (self.queries[name], self.train))
        return queries, train, tokenizer


def checked_run(run: Path) -> Path:
    """A run directory, which may not be there yet.

    Raises:
        InputError: nothing, or something else than a directory, can be there.
    """
    try:
        str(run).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{str(run)!r} is not a name in UTF-8, which reports have to print; choose another."
        ) from error
    if local_path(str(run)).exists() and not run.is_dir():
        raise InputError(f"{run} is not a directory: expected a run directory, or the name of a new one.")
    return run


def _device(name: str) -> torch.device:
    if name == "auto":
        return join_ranks()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"device={name!r} under torchrun, where each process takes its own: leave it out.")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError, AttributeError) as error:
        raise InputError(
            f"device={name!r} is not available here ({first_line(error)}). Give 'cpu' or 'cuda'."
        ) from error
    if device.type == "meta":
        raise InputError(
            "device='meta' holds no numbers. Give 'cpu' or 'cuda', or ask `wherefrom plan` what it would cost."
        )
    return device
