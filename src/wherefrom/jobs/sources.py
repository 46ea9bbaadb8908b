"""What a run directory of the command was made from, model, examples and how they are read: later commands know it.

`RUN/sources.json` holds what `wherefrom fit` was given last; `RUN/scores/NAME/sources.json` what those scores are of,
which stays what it is when the run is fitted on something else. This module reads and writes both and makes a `Study`
of the first; it knows no arguments and prints nothing.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import Any

import torch

from wherefrom.engine.execution import Execution
from wherefrom.hf.preparation import Preparation, Source, read_examples
from wherefrom.hf.pretrained import Pretrained, PretrainedStudy, checked_device
from wherefrom.hf.text import ModelLoading, local_path
from wherefrom.methods.factored import EKFAC, Factored
from wherefrom.report.passages import DatasetPassages, Tokenizer
from wherefrom.runtime.distributed import Ranks
from wherefrom.runtime.errors import DamagedError, InputError, check_argument
from wherefrom.scoring.results import Result
from wherefrom.scoring.tokens import INDEX, TokenScores
from wherefrom.store.files import checked_name, read_json, within, write_text
from wherefrom.store.fingerprint import (
    MODEL,
    QUERIES,
    TRAIN,
    Fingerprint,
    check_about,
    dataset_digest,
    differences,
    model_digest,
    unlike,
)
from wherefrom.store.locks import run_lock
from wherefrom.store.names import finished, found_result, known_fingerprint
from wherefrom.store.recording import read_recording
from wherefrom.tasks.preference.training import PreferenceTraining
from wherefrom.tasks.task import checked_settings

SOURCES = "sources.json"
_FORMAT = 4
# The entries of the file, those of its parts among them.
_TYPES: dict[str, type | UnionType] = {
    "model": str, "layers": list | None, "empirical": bool, "seed": int, "history": str | None,
    "names": list, "split": str, "format": str | None, "column": str | None, "count": str | None, "unit": str,
    "max_length": int | None, "end_token": bool, "source_column": str | None,
    "dtype": str, "quantization": str | None, "device_map": str | None,
    "preference": str | None, "beta": float | None, "reference": str | None, "label_smoothing": float | None,
    "gamma": float | None, "kl": float | None, "desirable_weight": float | None, "undesirable_weight": float | None,
}  # fmt: skip
_FIT_AGAIN = "Delete it and run `wherefrom fit` again; it finds the factors that are there."
_OTHERWISE = "Read from their names again, the training examples are others: make the study of what is there now."
_SCORE_AGAIN = "Delete it and run `wherefrom score` again; it finds the scores that are there."

logger = logging.getLogger("wherefrom")


@dataclass(frozen=True)
class DataSource:
    """Where examples come from, files, saved datasets or names on the hub, and how they are read."""

    names: tuple[str, ...]
    split: str
    preparation: Preparation

    def __post_init__(self) -> None:
        check_argument(bool(self.names), "train", "", "a file, a saved dataset or a name on the hub")
        twice = [name for name, times in Counter(self.names).items() if times > 1]
        check_argument(not twice, "train", ", ".join(twice), "each name once; it is there twice")

    def read(self) -> list[Source]:
        """Read the examples; several sources are called by their files' names, if these tell them."""
        stems = Counter(Path(each).stem for each in self.names)
        several = {Path(each).stem if stems[Path(each).stem] == 1 else each: each for each in self.names}
        return read_examples(several if len(self.names) > 1 else self.names[0], self.split)

    def __str__(self) -> str:
        return ", ".join(self.names)


@dataclass(frozen=True)
class RunSources:
    """What a run directory, or one of its results, was made from.

    Attributes:
        loading: how the model is loaded. Whether its code is trusted is not in the file, or who shares a run directory
            would decide it for others: each command says it.
        empirical, seed: what factors were fitted with.
        history: a folder that `TrainingRecorder` has written.
        trained: how, where it was on preferences.
        queries: of a result; None for the run.
        commands: the arguments of `wherefrom` that made it, in order.
    """

    model: str
    layers: list[str] | None
    train: DataSource
    empirical: bool
    seed: int
    loading: ModelLoading = field(default_factory=ModelLoading)
    history: str | None = None
    trained: PreferenceTraining = field(default_factory=PreferenceTraining)
    queries: DataSource | None = None
    commands: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def of_study(cls, study: PretrainedStudy, method: Factored) -> RunSources:
        """Where a study's model and training examples were read from; refuses as `record_sources`."""
        made, task = study.pretrained, study._sweep.task
        given = [each.called for each in made.sources if not each.place]
        whole = {"base": made.base is not None, "quantization": not isinstance(made.loading.quantization, str | None)}
        given += [name for name, is_given in whole.items() if is_given]
        if given:
            raise InputError(
                f"{given[0]} was given to study_from_pretrained itself, and commands have to find it again: save it "
                "(save_pretrained; save_to_disk or lines of JSON), and give its name."
            )
        train = DataSource(tuple(each.place for each in made.sources), "train", made.preparation)
        layers = None if task.layers is None else list(task.layers)
        found = cls(str(made.folder), layers, train, method.empirical, method.seed, made.loading)
        again = found.pretrained()
        usual = checked_settings(again.default_task(torch.device("cpu")))
        if others := differences(checked_settings(task), usual):
            raise InputError(f"task={type(task).__name__}(...), and commands take the usual one. {'; '.join(others)}.")
        check_about({TRAIN: dataset_digest(study.train)}, {TRAIN: dataset_digest(again.train)}, _OTHERWISE)
        return found

    @classmethod
    def load(cls, run: Path, trust_remote_code: bool = False) -> RunSources:
        """Read what `fit` wrote.

        Args:
            trust_remote_code: whether the model's code may be run.

        Raises:
            InputError: there is nothing.
            DamagedError: it cannot be read.
        """
        file = checked_run(run) / SOURCES
        if not file.exists():
            raise InputError(f"{run} is not a run directory: it has no {SOURCES}. Start with: wherefrom fit {run} ...")
        return cls._read(file, _FIT_AGAIN, trust_remote_code)

    @classmethod
    def of_result(cls, folder: Path, trust_remote_code: bool = False) -> RunSources:
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
        return cls._read(file, _SCORE_AGAIN, trust_remote_code)

    @classmethod
    def _read(cls, file: Path, advice: str, trust_remote_code: bool) -> RunSources:
        found = read_json(file, advice)
        if found.pop("format", None) != _FORMAT:
            raise DamagedError(f"{file} is another version's. {advice}")
        try:
            train, queries, loading = found.pop("train"), found.pop("queries"), found.pop("loading")
            # Not of earlier versions.
            trained, commands, folder = found.pop("trained", {}), found.pop("commands", []), found.pop("folder", None)
            for part in (found, loading, trained):
                _check_types(part)
            sources = cls(
                train=_source(train),
                queries=None if queries is None else _source(queries),
                loading=ModelLoading(**loading, trust_remote_code=trust_remote_code),
                trained=PreferenceTraining(**trained),
                commands=tuple(tuple(map(str, each)) for each in commands),
                **found,
            )
        except (KeyError, TypeError, AttributeError, InputError) as error:
            raise DamagedError(f"{file} cannot be read ({error}). {advice}") from error
        if isinstance(folder, str):
            sources._check_folder(file.parent.resolve() / folder)
        return sources

    def _check_folder(self, folder: Path) -> None:
        """Refuse to read, from where the command runs, other files than were meant where it ran before.

        Args:
            folder: where that was. It moves together with the run, and files that are not there any more are looked
                for from here.
        """
        data = [each.names for each in (self.train, self.queries) if each is not None]
        for name in (self.model, *filter(None, [self.history]), *(name for names in data for name in names)):
            before, now = folder / name, Path(name)
            if before.exists() and not (now.exists() and now.samefile(before)):
                raise InputError(
                    f"{name!r} was {before.resolve()}, and from {Path.cwd()} it is not: run the command in "
                    f"{folder.resolve()}, or fit with absolute names."
                )

    def save(self, run: Path, name: str | None = None) -> None:
        """Write the file of a run, or of its scores of a name."""
        folder = run if name is None else within(run, "scores", name)
        written = {"format": _FORMAT, **asdict(self)}
        del written["loading"]["trust_remote_code"]
        written["folder"] = os.path.relpath(Path.cwd(), folder.resolve())  # where names begin
        with run_lock(run):
            write_text(folder / SOURCES, json.dumps(written, indent=1) + "\n")

    @property
    def fitted(self) -> dict[str, object]:
        """What factors were fitted with, as fields of a method."""
        return {"empirical": self.empirical, "seed": self.seed}

    def queries_from(self, name: str, split: str, said: Preparation) -> DataSource:
        """Queries, cut as the training examples, of the format, column and counted tokens that were said of them."""
        cut = self.train.preparation
        preparation = replace(said, unit=cut.unit, max_length=cut.max_length, end_token=cut.end_token)
        return DataSource((name,), split, preparation)

    def pretrained(self) -> Pretrained:
        """The model and its training examples, before its weights are loaded."""
        return Pretrained(
            self.model, self.train.read(), self.train.preparation, self.loading, layers=self.layers,
            trained=self.trained,
        )  # fmt: skip

    def study(self, run: Path, device: str, execution: Execution) -> PretrainedStudy:
        """Load tokenizer, training sequences and model."""
        if device != "auto" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(f"device={device!r} under torchrun, where each process takes its own: leave it out.")
        # Now, or it turns out when all texts are read.
        chosen = checked_device(None if device == "auto" else device, self.loading)
        history = () if self.history is None else read_recording(self.history)
        return self.pretrained().study(run, chosen, history=history, execution=execution)

    def described(self) -> dict[str, str]:
        """Where things came from, for a page."""
        texts = {"training text": self.train, "query text": self.queries}
        return {"model directory": self.model, **{name: str(each) for name, each in texts.items() if each is not None}}

    def passages(self, scores: Fingerprint) -> tuple[DatasetPassages, DatasetPassages, Tokenizer | None]:
        """The sequences behind scores: queries, training set, and what tokenises them.

        Args:
            scores: the fingerprint of the scores whose sources these are.

        Raises:
            MismatchError: a text is not what was scored any more.
        """
        assert self.queries is not None
        pretrained = self.pretrained()
        queried = pretrained.prepare(self.queries.names[0], self.queries.split, self.queries.preparation)
        queries, train = (DatasetPassages(each, pretrained.tokenizer) for each in (queried, pretrained.train))
        check_about(
            scores,
            {QUERIES: queries.digest, TRAIN: train.digest},
            f"The texts {self.queries} and {self.train}, or the tokenizer of {self.model}, have changed "
            "since they were scored: put them back, or fit and score again.",
        )
        return queries, train, pretrained.tokenizer


def _source(found: dict[str, Any]) -> DataSource:
    """An entry of the file."""
    preparation = found.pop("preparation")
    _check_types(found)
    _check_types(preparation)
    names = found.pop("names")
    if not all(isinstance(each, str) for each in names):
        raise TypeError(f"names is {names!r}")
    return DataSource(tuple(names), preparation=Preparation(**preparation), **found)


def _check_types(values: Mapping[str, object]) -> None:
    """Refuse entries of another type than they were written with."""
    for name, value in values.items():
        if not isinstance(value, _TYPES.get(name, object)):
            raise TypeError(f"{name} is {value!r}")


def record_sources(
    study: PretrainedStudy,
    scores: Result | None = None,
    queries: str | Path | None = None,
    *,
    split: str = "train",
    preparation: Preparation | None = None,
    method: Factored | None = None,
) -> None:
    """Write down where a study's model and texts are, so that the command can take its run directory.

    `wherefrom ask`, `serve`, `audit` and the others then work on it as after `wherefrom fit`, with what is there.

    Args:
        study: what `study_from_pretrained` has made of names: of a directory or on the hub, and of files or saved
            datasets or on the hub. A history is not written down.
        scores: what `study.score` has returned and stored, so that `top`, `report` and the served page show them.
        queries: the name of the examples that were scored.
        split, preparation: as `study.prepare` was given them.
        method: whose factors the run has; `EKFAC()` unless given.

    Raises:
        InputError: a command could not find again, or say, what the study was made of.
        MismatchError: there are other texts under these names than those of the study, or of the scores.
    """
    sources = RunSources.of_study(study, method or EKFAC())
    written: dict[str | None, RunSources] = {None: sources}
    if scores is not None:
        check_argument(queries is not None, "queries", queries, "the name of the examples that were scored")
        stored = bool(scores.name) and within(study.path, "scores", scores.name).is_dir()
        check_argument(stored, "scores", scores.name, f"what is stored in {study.path / 'scores'}")
        how = preparation or replace(sources.train.preparation, source_column=None)
        of_scores = replace(sources, queries=DataSource((str(queries),), split, how))
        of_scores.passages(scores.fingerprint)  # refuses other texts
        written[scores.name] = of_scores
    with Ranks.current().agreeing():
        if Ranks.current().is_main:
            for name, each in written.items():
                each.save(study.path, name)


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


def token_scores_of(folder: Path, scores: Result) -> TokenScores | None:
    """Token scores of the run that belong to the scores in a folder, of the most pairs, if there are any."""
    found = [TokenScores.load(index.parent) for index in folder.parents[1].glob(f"tokens/*/{INDEX}")]
    return max(
        (each for each in found if not each.differences(scores.fingerprint)),
        key=lambda each: len(each.pairs),
        default=None,
    )


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
