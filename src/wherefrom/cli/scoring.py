"""The subcommands `wherefrom fit`, `score` and `self-influence`: on a Hugging Face model and text.

What `fit` and `score` were given is written into the run directory, so that the later commands need only the run. All
work is the library's; this module turns arguments into its calls.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
import tyro
from rich.console import Console

from wherefrom.cli.methods import ALL, EXECUTED, FACTORED, READ, default, flags, subcommands
from wherefrom.cli.shared import Run
from wherefrom.hf.preparation import Preparation
from wherefrom.hf.pretrained import PretrainedStudy
from wherefrom.hf.text import ModelLoading
from wherefrom.jobs.sources import SOURCES, DataSource, RunSources, checked_run, log_other_scores
from wherefrom.report.passages import DatasetPassages
from wherefrom.report.reading import reading
from wherefrom.report.text import hits_table
from wherefrom.runtime.distributed import Ranks
from wherefrom.runtime.errors import InputError
from wherefrom.scoring.keep import Aggregated, Aggregation, Keep, Pairs, Tokens, Top
from wherefrom.scoring.results import Scores
from wherefrom.store.fingerprint import UNIT
from wherefrom.tasks.preference.training import PreferenceTraining

console = Console()

FITTED: Any = subcommands(FACTORED, only=("empirical", "seed", "adam"))
SCORED: Any = subcommands(ALL, of_the_fit=True)
WITH_ITSELF: Any = subcommands(FACTORED, only=("empirical", "seed", "adam", "damping"), of_the_fit=True)
PREPARED: Any = flags(Preparation)
TRAINED: Any = flags(PreferenceTraining)
LOADED: Any = flags(ModelLoading, only=("dtype", "device_map", "trust_remote_code"))


def fit(
    run: Run,
    *,
    model: str,
    train: tuple[str, ...],
    method: tyro.conf.OmitArgPrefixes[FITTED] = default(FITTED),  # noqa: B008  (a frozen value)
    layers: tuple[str, ...] = (),
    split: str = "train",
    preparation: tyro.conf.OmitArgPrefixes[PREPARED] = PREPARED(),  # noqa: B008
    training: tyro.conf.OmitArgPrefixes[TRAINED] = TRAINED(),  # noqa: B008
    loading: tyro.conf.OmitArgPrefixes[LOADED] = LOADED(),  # noqa: B008
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    history: str | None = None,
    execution: tyro.conf.OmitArgPrefixes[EXECUTED] = EXECUTED(),  # noqa: B008
    device: str = "auto",
    overwrite: bool = False,
    profile: bool = False,
) -> None:
    """Fit curvature factors of a model on its training examples.

    Args:
        run: The directory for factors, scores and reports.
        model: A model directory, an adapter's directory or a hub name.
        train: The training examples: .txt, .jsonl, .csv or .parquet files, saved datasets or hub names. Of several,
            each example knows its source.
        method: Whose factors; those of EK-FAC unless one is named.
        layers: Names or patterns of the layers to track, such as '*.mlp.*'; linear ones but the head by default.
        split: The split of a saved or hub dataset.
        preparation: How examples are read.
        training: How the model was trained, where it was on preferences.
        loading: How the model is loaded.
        load_in_4bit: Quantize the model's weights to 4 bits (NF4) by bitsandbytes, for an adapter that was trained so.
        load_in_8bit: The same to 8 bits.
        history: A folder that `TrainingRecorder` has written, for methods that look at the training.
        execution: How to compute.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', ...
        overwrite: Replace factors that were made from something else.
        profile: Print where the time went, and for that wait for a GPU after each action.
    """
    if (checked_run(run) / SOURCES).exists():
        RunSources.load(run)  # or hours later it turns out that it cannot be read
    if load_in_4bit and load_in_8bit:
        raise InputError("load_in_4bit=True with load_in_8bit=True: leave one of them out.")
    quantization: Any = "4bit" if load_in_4bit else "8bit" if load_in_8bit else None
    chosen, executed = method.made(), execution.made()
    data = DataSource(train, split, preparation.made())
    loaded = replace(loading.made(), quantization=quantization)
    sources = RunSources(
        model, list(layers) or None, data, chosen.empirical, chosen.seed, loaded, history, training.made(),
        commands=(tuple(sys.argv[1:]),),
    )  # fmt: skip
    study = sources.study(run, device, executed)
    study.profile.synchronize = profile
    log_other_scores(study)
    study.fit(chosen, overwrite=overwrite)
    Ranks.current().first(lambda: sources.save(run))
    _say(f"{chosen.name} factors of {len(study.train):,} sequences are in {run / 'factors'}.", study, profile)


def score(
    run: Run,
    *,
    queries: str,
    method: tyro.conf.OmitArgPrefixes[SCORED] = default(SCORED),  # noqa: B008
    name: str | None = None,
    split: str = "validation",
    reading: tyro.conf.OmitArgPrefixes[READ] = READ(),  # noqa: B008
    trust_remote_code: bool = False,
    tokens: int | None = None,
    per_layer: bool = False,
    self_influence: bool = False,
    aggregate_queries: Aggregation | None = None,
    aggregate_train: Aggregation | None = None,
    top_only: int | None = None,
    execution: tyro.conf.OmitArgPrefixes[EXECUTED] = EXECUTED(),  # noqa: B008
    device: str = "auto",
    explain: bool = False,
    overwrite: bool = False,
    profile: bool = False,
) -> None:
    """Score every training sequence for every query.

    Args:
        run: A run directory that `wherefrom fit` made.
        queries: The queries: a file, a saved dataset or a hub name, cut as the training examples were.
        method: How; by EK-FAC unless one is named. What it needs is fitted first if the run does not have it yet.
        name: Of the scores in the run; by default the method, its settings, and a digest of all that
            they depend on, so that other queries or another damping lie side by side.
        split: The split of a saved or hub dataset.
        reading: How queries are read.
        trust_remote_code: Run Python code that comes with the model, as for `wherefrom fit`.
        tokens: Also score the tokens of this many most positive and most negative sequences of each query; the report
            shades them.
        per_layer: Also store each layer's part of every score.
        self_influence: Also store each training sequence's score with itself, for normalised scores.
        aggregate_queries: One score for all queries together: of the sum or the mean of their losses.
        aggregate_train: One score of each query for all training sequences together.
        top_only: Store only this many of each query's highest and lowest scores, for very many training sequences.
        execution: How to compute.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', ...
        explain: Print what would be done, and what it would cost with the fit, and stop.
        overwrite: Replace scores that were made from something else.
        profile: Print where the time went, and for that wait for a GPU after each action.
    """
    executed = execution.made()
    keep = _chosen_keep(per_layer, self_influence, aggregate_queries, aggregate_train, top_only)
    if tokens is not None:
        Tokens(tokens)  # or the model would be loaded first
        if not isinstance(keep, Pairs):
            raise InputError(
                f"tokens={tokens} needs every pair's score, which top_only, aggregate_queries and aggregate_train do "
                "not store: leave one of them out."
            )
    sources = RunSources.load(run, trust_remote_code)
    chosen = method.made(sources.fitted)
    chosen.check(keep, executed.half_precision)
    study = sources.study(run, device, executed)
    study.profile.synchronize = profile
    source = sources.queries_from(queries, split, reading.made())
    sequences = study.prepare(queries, split, source.preparation)
    if explain:
        plan = study.plan(sequences, chosen, keep=keep)
        if Ranks.current().is_main:
            console.print(plan.table())
        return
    found = study.score(sequences, chosen, keep=keep, name=name, overwrite=overwrite)
    scored = replace(sources, queries=source, commands=(*sources.commands, tuple(sys.argv[1:])))
    Ranks.current().first(lambda: scored.save(run, found.name))
    if tokens is not None:
        study.score(sequences, chosen, keep=Tokens(tokens), overwrite=overwrite)
    if isinstance(found, Scores):
        shape = "{:,} queries x {:,} training sequences".format(*found.values.shape)
    else:
        shape = f"{len(found.values):,} queries, the {found.values.shape[1]} highest and lowest each,"
    _say(f"Scores of {shape} are in {run / 'scores' / found.name}.", study, profile)


def _chosen_keep(
    per_layer: bool,
    self_influence: bool,
    aggregate_queries: Aggregation | None,
    aggregate_train: Aggregation | None,
    top_only: int | None,
) -> Keep[Any]:
    """What is kept of scores."""
    given = {
        "self_influence=True": self_influence,
        f"aggregate_queries={aggregate_queries!r}": aggregate_queries,
        f"aggregate_train={aggregate_train!r}": aggregate_train,
    }
    others = [name for name, said in {**given, "per_layer=True": per_layer}.items() if said]
    if top_only is not None and others:
        raise InputError(
            f"{others[0]} with only the {top_only} highest and lowest scores: these are stored alone. Leave one of "
            "them out."
        )
    if self_influence and (aggregate_queries or aggregate_train):
        raise InputError(
            "self_influence=True belongs to single examples, and aggregate_queries and aggregate_train sum over them. "
            "Leave one of them out."
        )
    if top_only is not None:
        return Top(top_only)
    if aggregate_queries or aggregate_train:
        return Aggregated(aggregate_queries, aggregate_train, layers=per_layer)
    return Pairs(layers=per_layer, self_influence=self_influence)


def self_influence(
    run: Run,
    *,
    method: tyro.conf.OmitArgPrefixes[WITH_ITSELF] = default(WITH_ITSELF),  # noqa: B008
    k: int = 10,
    execution: tyro.conf.OmitArgPrefixes[EXECUTED] = EXECUTED(),  # noqa: B008
    device: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> None:
    """Show the training sequences that the model could only learn by heart: those of the highest self-influence.

    Args:
        run: A run directory that `wherefrom fit` made.
        method: How; by EK-FAC unless one is named.
        k: How many sequences are shown.
        execution: How to compute.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', ...
        trust_remote_code: Run Python code that comes with the model, as for `wherefrom fit`.
        overwrite: Replace what was made from something else.
    """
    executed, sources = execution.made(), RunSources.load(run, trust_remote_code)
    chosen = method.made(sources.fitted)
    study = sources.study(run, device, executed)
    values = study.self_influence(chosen, overwrite=overwrite)
    if Ranks.current().is_main:
        rise = chosen.rise(len(values))
        scale = None if rise is None else torch.tensor([rise], dtype=torch.float64)
        scores = Scores(values.unsqueeze(0), {"method": chosen.name, UNIT: "nats"}, rise_per_score=scale)
        passages = DatasetPassages(study.train)
        console.print(hits_table("Highest self-influence", scores.top(k), passages, reading(scores)))


def _say(message: str, study: PretrainedStudy, profile: bool) -> None:
    if not Ranks.current().is_main:
        return
    if profile:
        console.print(*study.profile.tables())
    console.print(message, soft_wrap=True)
