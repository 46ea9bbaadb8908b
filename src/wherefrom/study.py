"""Study: a model, what it was trained on and for, and the directory where what is found out about it is kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Concatenate, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from wherefrom.curvature.conditioning import Conditioning, conditioning_digest, conditioning_roots
from wherefrom.curvature.factors import Factors, checked_strategy
from wherefrom.curvature.fitting import Fitting
from wherefrom.engine.layers import coverage, mostly_left_out, select_layers
from wherefrom.engine.sweep import Sweep
from wherefrom.methods.index import GradientIndex
from wherefrom.methods.projections import Compression, IndexOptions
from wherefrom.planning.plan import Plan
from wherefrom.report.figures import Figure
from wherefrom.report.html import render_report, write_page
from wherefrom.report.passages import DatasetPassages, DatasetTokens, Tokenizer
from wherefrom.runtime.errors import InputError
from wherefrom.runtime.memory import checked_batch_size, within_memory
from wherefrom.runtime.precision import HalfPrecision
from wherefrom.scoring.kept_scores import KeptScores
from wherefrom.scoring.options import Options, PairwiseOptions, RescoredOptions, ScoreOptions, layer_groups
from wherefrom.scoring.rescoring import checked_candidates
from wherefrom.scoring.results import Scores, TopScores
from wherefrom.scoring.scoring import Scoring, make_plan
from wherefrom.scoring.tokens import TokenScores
from wherefrom.store.cache import Stages
from wherefrom.store.files import checked_name, within
from wherefrom.store.fingerprint import (
    LEFT_OUT,
    MODEL,
    Dataset,
    check_about,
    checked_length,
    dataset_digest,
    model_digest,
    names_summary,
)
from wherefrom.store.locks import run_lock
from wherefrom.store.names import log_others, result_name
from wherefrom.tasks.task import Batch, Task, checked_settings
from wherefrom.version import VERSION

logger = logging.getLogger("wherefrom")

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _alone(
    method: Callable[Concatenate[Study[Batch], Parameters], Result],
) -> Callable[Concatenate[Study[Batch], Parameters], Result]:
    """A method that runs `Study.alone`, and says in our words that memory has run out."""
    advice = "Track fewer layers, give a smaller batch size or a query_rank, or use a device with more memory."

    @wraps(method)
    def locked(study: Study[Batch], /, *arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        with study.alone(), within_memory(f"{method.__name__} does", study._sweep.device, advice):
            return method(study, *arguments, **options)

    return locked


class Study(Generic[Batch]):
    """Fits curvature factors and scores queries for one trained model.

    Args:
        path: the run directory; factors and scores are kept there, and reused when nothing has changed.
        model: the trained model, on the device where it is to run. It is left as it is.
        task: the loss, the measurement, and the tracked layers.
        train: the training examples: anything with `len` and integer positions.
        progress: show progress bars; None shows them when the standard error is a terminal.
        checkpoint_seconds: how often a sweep may save its partial sums, so that it can be resumed; 0 is after every
            batch.
        memory_budget: GiB that may be taken on the model's device beyond the model and its factors; None is most of
            what is free.
        compile_activations: run the model's activation functions through torch.compile, which makes each pass through
            a model like GPT-2 a fifth faster after some seconds of compiling.
        offload_factors: keep covariances, eigenvectors and eigenvalues in the host's memory, and bring a layer's to the
            device when it is needed: slower, for models whose factors do not fit.

    Raises:
        InputError: `train` is empty, or the memory budget is not positive.
        LayerError: no layer can be tracked.
    """

    def __init__(
        self,
        path: str | Path,
        model: nn.Module,
        task: Task[Batch],
        *,
        train: Dataset[object],
        progress: bool | None = None,
        checkpoint_seconds: float = 60.0,
        memory_budget: float | None = None,
        compile_activations: bool = False,
        offload_factors: bool = False,
    ) -> None:
        checked_length("train", train)
        if not isinstance(model, nn.Module):
            raise InputError(f"model is a {type(model).__name__}: expected a torch.nn.Module.")
        if memory_budget is not None and not 0 < memory_budget < 2**40:
            raise InputError(f"memory_budget={memory_budget}: expected a number of GiB above 0, or None.")
        self.path = Path(path)
        self.train = train
        layers = select_layers(model, task.layers, task.head(model))
        self._sweep = Sweep(
            model,
            task,
            layers,
            progress=progress,
            checkpoint_seconds=checkpoint_seconds,
            memory_budget=None if memory_budget is None else int(memory_budget * 2**30),
            compile_activations=compile_activations,
            offload_factors=offload_factors,
        )
        self.layers = layers
        if self._sweep.ranks.writes:
            logger.info(f"{coverage(model, layers)}.")
        self._left_out = mostly_left_out(model, layers, task.head(model))
        if self._left_out and self._sweep.ranks.writes:
            logger.warning(f"{self._left_out}.")
        self.profile = self._sweep.profile
        self._lock = run_lock(self.path)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other runs out of the run directory; they wait. What the methods below do, for several calls together.

        Raises:
            StorageError: the directory cannot be written.
        """
        with ExitStack() as stack:
            self._sweep.ranks.first(lambda: stack.enter_context(self._lock))
            yield

    @_alone
    def fit(
        self,
        strategy: str = "ekfac",
        *,
        empirical: bool = False,
        half_precision: bool = False,
        batch_size: int | None = None,
        seed: int = 0,
        conditioning: Conditioning | None = None,
        name: str | None = None,
        overwrite: bool = False,
    ) -> Factors:
        """Fit curvature factors on the training examples, or load them when they are there.

        Args:
            strategy: "identity", "diagonal", "kfac", "ekfac" or "shampoo".
            empirical: use the dataset's targets instead of targets drawn from the model (the Fisher information).
            half_precision: bfloat16 products in the model's passes; factors stay float32.
            batch_size: None finds one; results depend on it only by rounding.
            seed: of the drawn targets.
            conditioning: what the optimizer has multiplied each weight's gradient with, by parameter name
                (`adam_conditioning` for Adam's), so that curvature, its damping and scores are those of the coordinates
                that it descended in. For "shampoo", "diagonal" and "identity".
            name: of the factors in the run directory; by default "sampled" or "empirical", with "-half" in half
                precision and "-conditioned", and a digest of all that they depend on, so that another seed or training
                set lies side by side. Strategies share what they have in common under one name.
            overwrite: fit again and replace, also what has this name and was made from something else, which is refused
                otherwise. It replaces what the strategy has, and eigenvalues in a basis that is replaced (a "kfac" has
                the basis of "ekfac"); nothing of other strategies, and no scores. Where it is interrupted, the call
                without it goes on.

        Raises:
            WherefromError: see `wherefrom.runtime.errors`; what was finished before stays valid.
        """
        checked_strategy(strategy)
        sweep = self._precise_sweep(half_precision)
        if name is not None:
            checked_name(name)
        label = ("empirical" if empirical else "sampled") + "-half" * half_precision
        label += "-conditioned" * (conditioning is not None)
        fingerprint = self._fingerprint()
        fingerprint["targets"] = "dataset" if empirical else f"sampled, seed {seed}"
        fingerprint["precision"] = str(sweep.precision)
        roots = {} if conditioning is None else conditioning_roots(sweep, conditioning)
        fingerprint |= conditioning_digest(roots)
        folder = within(self.path, "factors", result_name(label, fingerprint, name))
        stages = Stages(folder, fingerprint, self.profile)
        stages.ranks.first(lambda: log_others(folder, fingerprint))
        size = checked_batch_size(batch_size)
        return Fitting(sweep, self.train, stages, None if empirical else seed, size, overwrite, roots).factors(strategy)

    def plan(self, queries: Dataset[object], strategy: str = "ekfac", **options: Unpack[ScoreOptions]) -> Plan:
        """What `score` would do with these arguments, and what that and the fit would cost, without doing it.

        Args:
            options: those of `ScoreOptions`.

        Returns:
            `str(plan)` is one line, `plan.table()` has the stages with their operations, memory and least time.

        Raises:
            InputError: there are no queries, or an option is impossible.
        """
        checked_length("queries", queries)
        chosen = Options.of(ScoreOptions.__optional_keys__, None, **options)
        sweep = self._precise_sweep(chosen.half_precision)
        return make_plan(sweep, checked_strategy(strategy), queries, self.train, chosen, loaded=False)

    @_alone
    def score(self, queries: Dataset[object], factors: Factors, **options: Unpack[PairwiseOptions]) -> Scores:
        """Score every (query, training example) pair, or load the scores when they are there.

        The preconditioned query gradients stay in memory, as many as fit, and the training set is swept once for each
        such block of queries. Scores are computed in parts and put together in a file, so that a large training set
        takes no more memory than a small one.

        Args:
            queries: examples of the kind that the task measures.
            factors: what `fit` returned for this model.
            options: those of `PairwiseOptions`; `damping` above all.

        Raises:
            WherefromError: see `wherefrom.runtime.errors`; what was finished before stays valid.
        """
        chosen = Options.of(PairwiseOptions.__optional_keys__, None, **options)
        return self._kept(_checked(queries), factors, chosen).scores()

    @_alone
    def score_top(
        self, queries: Dataset[object], factors: Factors, k: int = 100, **options: Unpack[ScoreOptions]
    ) -> TopScores:
        """Each query's `k` highest and `k` lowest scores, or load them when they are there.

        As `score`, without ever holding or storing a matrix of queries x training examples: for millions of those.

        Args:
            queries, factors: as in `score`.
            options: those of `ScoreOptions`.

        Raises:
            WherefromError: see `wherefrom.runtime.errors`; what was finished before stays valid.
        """
        chosen = Options.of(ScoreOptions.__optional_keys__, k, **options)
        return self._kept(_checked(queries), factors, chosen).highest(k)

    @_alone
    def score_candidates(
        self, queries: Dataset[object], factors: Factors, candidates: Tensor, **options: Unpack[ScoreOptions]
    ) -> TopScores:
        """The exact scores of candidates alone, or load them when they are there: retrieval in two stages.

        A cheap method names training examples that may matter to a query (`bm25_scores(...).topk(100).indices`, or
        `GradientIndex.query(...).train`), and only those are swept, all queries' candidates together.

        Args:
            candidates: training positions, whole numbers [queries, candidates], each once in a row.
            queries, factors: as in `score`.
            options: those of `ScoreOptions`, without `query_rank` and `query_bits`.

        Returns:
            All of them, best first; `lowest_train` is the same the other way round.

        Raises:
            WherefromError: see `wherefrom.runtime.errors`; what was finished before stays valid.
        """
        chosen = Options.of(ScoreOptions.__optional_keys__ - {"query_rank", "query_bits"}, None, **options)
        positions = checked_candidates(candidates, len(_checked(queries)), len(self.train))
        return self._kept(queries, factors, chosen).of_candidates(positions)

    @_alone
    def self_influence(
        self,
        factors: Factors,
        *,
        damping: float | None = None,
        half_precision: bool = False,
        batch_size: int | None = None,
        name: str | None = None,
        overwrite: bool = False,
    ) -> Tensor:
        """Each training example's score with itself, g_t^T (H + damping)^-1 g_t, in one sweep; or load them.

        High for examples that the model could only learn by heart: wrong labels, rare cases (Koh & Liang 2017, section
        5.4; Feldman & Zhang 2020). For `identity` it is the squared norm of the gradient.

        Args:
            factors, damping, half_precision, name, overwrite: as in `score`; kept in `RUN/self_influence`.
            batch_size: None finds one.

        Returns:
            [train], in dataset order; float32, or float64 for a float64 model.

        Raises:
            WherefromError: see `wherefrom.runtime.errors`; what was finished before stays valid.
        """
        options = Options(
            damping=damping, half_precision=half_precision, train_batch_size=batch_size, name=name, overwrite=overwrite
        )
        return self._kept(None, factors, options).self_influence()

    @_alone
    def score_tokens(
        self,
        queries: Dataset[object],
        factors: Factors,
        *,
        top: int | None = None,
        **options: Unpack[RescoredOptions],
    ) -> TokenScores:
        """Score every token of training examples, or load the scores when they are there.

        Args:
            top: only the pairs of each query with its `top` most positive and `top` most negative training examples,
                which are found first with `score`, and cost little; None is every pair, written to disk in parts of
                bounded size, at (tokens of a training example) times the cost of `score`.
            queries, factors: as in `score`.
            options: those of `RescoredOptions`. `rescore` is for finding the pairs; their tokens are scored with
                gradients of the `query_rank` or `query_bits`. `name` is that of the sequence scores that these are the
                parts of; they are kept beside them. `overwrite` replaces token scores, never sequence scores.
        """
        if top is not None and top < 1:
            raise InputError(f"top={top}: expected at least 1, or None for every pair.")
        chosen = Options.of(RescoredOptions.__optional_keys__, None, **options)
        return self._kept(_checked(queries), factors, replace(chosen, overwrite=False)).of_tokens(top, chosen.overwrite)

    @_alone
    def index(self, factors: Factors, **options: Unpack[IndexOptions]) -> GradientIndex[Batch]:
        """Keep the compressed gradient of every training example on disk, for queries later; or open what is there.

        Args:
            factors: what `fit` returned for this model, without a conditioning.
            options: those of `IndexOptions`.

        Raises:
            WherefromError: see `wherefrom.runtime.errors`; what was finished before stays valid.
        """
        chosen = Compression.of(**options)
        if factors.roots:
            raise InputError("factors are conditioned, and an index is not: fit factors without a conditioning.")
        sweep = self._precise_sweep(chosen.half_precision)
        return GradientIndex.of(sweep, self.train, factors, chosen, self.path, self._fingerprint())

    @_alone
    def report(
        self,
        scores: Scores | TopScores,
        queries: Dataset[object],
        *,
        tokenizer: Tokenizer | None = None,
        tokens: TokenScores | None = None,
        figures: Sequence[Figure] = (),
        path: str | Path | None = None,
        summary: str = "",
        k: int = 10,
    ) -> Path:
        """Write one self-contained HTML page: every query with its most positive and most negative training examples.

        Args:
            scores: what `score`, `score_top` or any other way to score returned for these queries and this study.
            queries: the examples that were scored; their columns `text`, `title` and `label` are shown where there are
                any.
            tokenizer: decodes `input_ids` of examples without `text`, and the tokens that are shaded.
            tokens: what `score_tokens` returned for these queries; shades the tokens of the pairs that it has.
            figures: plots to show, such as those of `report.figures.load_figures`.
            path: the page; `reports/NAME.html` in the run directory by default, with the name of the scores, or the
                strategy and a digest for scores that are not stored.
            summary: a line below the title.
            k: how many examples of each sign are shown.

        Returns:
            Where the page is.

        Raises:
            MismatchError: the scores are about other queries, another training set or another model.
            WherefromError: an argument does not fit, or the page cannot be written.
        """
        if tokens is not None and tokenizer is None:
            raise InputError("tokens are given and tokenizer is None: expected the tokenizer that made their text.")
        if MODEL in scores.fingerprint:
            check_about(scores.fingerprint, {MODEL: model_digest(self._sweep.model)})
        if path is None:
            called = scores.name or result_name(scores.fingerprint.get("strategy", "scores"), scores.fingerprint)
            path = self.path / "reports" / f"{called}.html"
        path = Path(path)
        page = render_report(
            title=f"Where from? {self.path.name}",
            summary=summary,
            queries=DatasetPassages(queries, tokenizer),
            train=DatasetPassages(self.train, tokenizer),
            scores=scores,
            profile=self.profile.text(),
            tokens=DatasetTokens(tokens, self.train, tokenizer) if tokens is not None and tokenizer else None,
            figures=figures,
            k=k,
        )
        self._sweep.ranks.first(lambda: write_page(path, page))
        return path

    def _kept(self, queries: Dataset[object] | None, factors: Factors, options: Options) -> KeptScores[Batch]:
        """What is asked for, loaded or not; without queries, of the training examples with themselves."""
        sweep, strategy = self._precise_sweep(options.half_precision), checked_strategy(factors.strategy)
        groups = layer_groups(options.per_layer, list(self.layers))
        asked = self.train if queries is None else queries
        scoring = Scoring(sweep, strategy, factors.preconditioner(options.damping), asked, self.train, options, groups)
        fingerprint = self._score_fingerprint(queries, factors, options)
        return KeptScores(self.path, scoring, options.label(factors), fingerprint, self.profile)

    def _score_fingerprint(self, queries: Dataset[object] | None, factors: Factors, options: Options) -> dict[str, str]:
        """What scores depend on; refuses factors of another model."""
        precision = str(self._precise_sweep(options.half_precision).precision)
        found = options.fingerprint(self._fingerprint(), factors, precision)
        if queries is None:
            return found
        measured = checked_settings(self._sweep.task).get("measure", "measurement")
        asked = {"queries": dataset_digest(queries), "measured": measured}
        self._check_alike(asked)
        return found | asked

    def _precise_sweep(self, half_precision: bool) -> Sweep[Batch]:
        if half_precision and self._sweep.dtype == torch.float64:
            raise InputError("half_precision=True with a float64 model: load the model in float32, or leave it out.")
        return replace(self._sweep, precision=HalfPrecision(self._sweep.device)) if half_precision else self._sweep

    def _fingerprint(self) -> dict[str, str]:
        """What everything in this study depends on; taken anew each time, since weights and lists can change."""
        task = {name: value for name, value in checked_settings(self._sweep.task).items() if name != "measure"}
        with self.profile.action("fingerprint"):
            found = {
                "library": VERSION,
                "model": model_digest(self._sweep.model),
                "task": json.dumps(task, sort_keys=True),
                "layers": names_summary(list(self.layers)),
                "training data": dataset_digest(self.train),
                **({LEFT_OUT: self._left_out} if self._left_out else {}),
            }
        self._check_alike(found)
        return found

    def _check_alike(self, found: Mapping[str, str]) -> None:
        """Refuse to go on with processes that differ."""
        for name, value in found.items():
            self._sweep.ranks.check_alike(name, value)


def _checked(queries: Dataset[object]) -> Dataset[object]:
    """Queries of which there are some: None would stand for the training examples."""
    checked_length("queries", queries)
    return queries
