"""What a run directory of the command was made from: model, texts and how they are cut, so that later commands know.

`RUN/sources.json` holds what `wherefrom fit` was given last; `RUN/scores/NAME/sources.json` what those scores are of,
which stays what it is when the run is fitted on something else. This module reads and writes both and makes a `Study`
of the first; it knows no arguments and prints nothing.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Literal

from wherefrom.engine.execution import Execution
from wherefrom.hf.pretrained import PretrainedStudy, checked_device, study_from_pretrained
from wherefrom.hf.text import as_blocks, as_documents, load_tokenizer, local_path, read_texts
from wherefrom.report.passages import DatasetPassages
from wherefrom.runtime.distributed import Ranks
from wherefrom.runtime.errors import DamagedError, InputError
from wherefrom.store.files import checked_name, read_json, within, write_text
from wherefrom.store.fingerprint import (
    MODEL,
    QUERIES,
    TRAIN,
    Fingerprint,
    check_about,
    dataset_digest,
    model_digest,
    unlike,
)
from wherefrom.store.locks import run_lock
from wherefrom.store.names import finished, found_result, known_fingerprint
from wherefrom.store.recording import read_recording
from wherefrom.tasks.language import CausalLM

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SOURCES = "sources.json"
_FORMAT = 3
# The entries of the file, those of its texts among them.
_TYPES: dict[str, type | UnionType] = {
    "model": str, "layers": list | None, "empirical": bool, "seed": int, "history": str | None,
    "source": str, "split": str, "column": str | None, "unit": str, "length": int,
}  # fmt: skip
_FIT_AGAIN = "Delete it and run `wherefrom fit` again; it finds the factors that are there."
_SCORE_AGAIN = "Delete it and run `wherefrom score` again; it finds the scores that are there."

logger = logging.getLogger("wherefrom")


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
    """What a run directory, or one of its results, was made from.

    Attributes:
        empirical, seed: what factors were fitted with.
        history: a folder that `TrainingRecorder` has written.
        queries: of a result; None for the run.
    """

    model: str
    layers: list[str] | None
    train: TextSource
    empirical: bool
    seed: int
    history: str | None = None
    queries: TextSource | None = None

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
        return cls._read(file, _FIT_AGAIN)

    @classmethod
    def of_result(cls, folder: Path) -> RunSources:
        """Read what `score` wrote beside scores.

        Raises:
            InputError: there is nothing: the scores were not made by the command.
            DamagedError: it cannot be read.
        """
        file = within(folder, SOURCES)
        if not file.exists():
            raise InputError(
                f"{folder} does not say which texts its scores are of: it has no {SOURCES}. Score with "
                "`wherefrom score`, or make the page with Study.report."
            )
        return cls._read(file, _SCORE_AGAIN)

    @classmethod
    def _read(cls, file: Path, advice: str) -> RunSources:
        found = read_json(file, advice)
        if found.pop("format", None) != _FORMAT:
            raise DamagedError(f"{file} is another version's. {advice}")
        try:
            train, queries = found.pop("train"), found.pop("queries")
            for values in (found, train, queries or {}):
                _check_types(values)
            return cls(train=TextSource(**train), queries=None if queries is None else TextSource(**queries), **found)
        except (KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{file} cannot be read ({error}). {advice}") from error

    def save(self, run: Path, name: str | None = None) -> None:
        """Write the file of a run, or of its scores of a name."""
        folder = run if name is None else within(run, "scores", name)
        with run_lock(run):
            write_text(folder / SOURCES, json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n")

    def study(self, run: Path, device: str, execution: Execution) -> PretrainedStudy:
        """Load tokenizer, training sequences and model."""
        if device != "auto" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(f"device={device!r} under torchrun, where each process takes its own: leave it out.")
        chosen = checked_device(None if device == "auto" else device)  # or it turns out when all texts are read
        tokenizer = load_tokenizer(self.model)
        return study_from_pretrained(
            self.model,
            self.train.sequences(tokenizer),
            run=run,
            task=CausalLM(self.layers),
            tokenizer=tokenizer,
            device=chosen,
            history=() if self.history is None else read_recording(self.history),
            execution=execution,
        )

    def described(self) -> dict[str, str]:
        """Where things came from, for a page."""
        texts = {"training text": self.train, "query text": self.queries}
        return {
            "model directory": self.model,
            **{name: each.source for name, each in texts.items() if each is not None},
        }

    def passages(self, scores: Fingerprint) -> tuple[DatasetPassages, DatasetPassages, PreTrainedTokenizerBase]:
        """The sequences behind scores: queries, training set, and what tokenises them.

        Args:
            scores: the fingerprint of the scores whose sources these are.

        Raises:
            MismatchError: a text is not what was scored any more.
        """
        assert self.queries is not None
        tokenizer = load_tokenizer(self.model)
        queries, train = (DatasetPassages(each.sequences(tokenizer)) for each in (self.queries, self.train))
        check_about(
            scores,
            {QUERIES: queries.digest, TRAIN: train.digest},
            f"The texts {self.queries.source} and {self.train.source}, or the tokenizer of {self.model}, have changed "
            "since they were scored: put them back, or fit and score again.",
        )
        return queries, train, tokenizer


def _check_types(values: Mapping[str, object]) -> None:
    """Refuse entries of another type than they were written with."""
    for name, value in values.items():
        if not isinstance(value, _TYPES.get(name, object)):
            raise TypeError(f"{name} is {value!r}")


def chosen_scores(run: Path, name: str | None) -> Path:
    """The folder of a run's scores of a name or label; for None, of those that the command made or loaded last.

    Raises:
        InputError: there are none, or several of the label.
    """
    folder = within(run, "scores")
    if name is not None:
        return found_result(folder / checked_name(name))
    there = [each for each in finished(folder) if (each / SOURCES).exists()]
    if not there:
        known = ", ".join(each.name for each in finished(folder)) or "none"
        raise InputError(f"{folder}: no scores there of `wherefrom score`; found {known}. Compute them first.")
    latest = max(there, key=lambda each: (each / SOURCES).stat().st_mtime_ns)
    others = [each.name for each in finished(folder) if each != latest]
    if others:
        logger.info(f"These are the latest scores, {latest.name}; choose others with --name: {', '.join(others)}.")
    return latest


def log_other_scores(study: PretrainedStudy) -> None:
    """Say which scores of a run are about another training text or model than a study, and what happens with them."""
    there = {each.name: known_fingerprint(each) for each in finished(within(study.path, "scores"))}
    if not there or not Ranks.current().is_main:
        return
    now = {TRAIN: dataset_digest(study.train), MODEL: model_digest(study._sweep.model)}
    others = [name for name, fingerprint in there.items() if fingerprint is not None and unlike(fingerprint, now)]
    if others:
        logger.warning(
            f"Of the scores in {study.path}, {', '.join(others)} are of another training text or model than this fit. "
            "They stay, and `wherefrom top` and `wherefrom report` show them by --name with the texts that they are "
            "of; `wherefrom score` takes what is fitted now."
        )


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
