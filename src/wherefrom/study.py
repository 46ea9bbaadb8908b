"""Study: a model, what it was trained on and for, and the directory where what is found out about it lies."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, overload

import torch
from torch import Tensor, nn

from wherefrom.curvature.factors import Factors
from wherefrom.engine.execution import Execution
from wherefrom.engine.loading import DatasetLike, Examples, indexed
from wherefrom.engine.modules.coverage import coverage, mostly_left_out, never_run
from wherefrom.engine.modules.layers import TrackedLayer, select_layers, unwrapped
from wherefrom.engine.sweep import Sweep
from wherefrom.methods.factored import EKFAC, Factored
from wherefrom.methods.index.gradient_index import GradientIndex
from wherefrom.methods.index.sketches import Sketch
from wherefrom.methods.method import Context, Method
from wherefrom.planning.plan import Plan
from wherefrom.report.figures import Figure
from wherefrom.report.html import render_report, write_page
from wherefrom.report.notebook import View, query_view
from wherefrom.report.passages import DatasetPassages, DatasetTokens, Tokenizer
from wherefrom.runtime.errors import InputError, check_argument
from wherefrom.runtime.memory import within_memory
from wherefrom.runtime.precision import own_precision
from wherefrom.scoring.keep import Keep, Pairs, Scores_co
from wherefrom.scoring.results import Result, Scores
from wherefrom.scoring.tokens import TokenScores
from wherefrom.store.files import is_plain, within
from wherefrom.store.fingerprint import (
    LEFT_OUT,
    MODEL,
    TRAIN,
    check_about,
    model_digest,
    names_summary,
)
from wherefrom.store.locks import run_lock
from wherefrom.store.names import result_name
from wherefrom.store.weights import ModelStates
from wherefrom.tasks.task import Batch, Task, checked_settings
from wherefrom.version import VERSION

if TYPE_CHECKING:
    from wherefrom.methods.method import Checkpoint

logger = logging.getLogger("wherefrom")

_MEMORY_ADVICE = "Track fewer layers, give a smaller batch size or a query_rank, or use a device with more memory."


class Study(Generic[Batch]):
    """Scores training examples for queries of one trained model, by any method.

    Args:
        path: the run directory; factors and scores lie there, and are reused when nothing has changed.
        model: the trained model, on the device where it is to run. It is left as it is.
        task: the loss, the measurement, and the tracked layers.
        train: the training examples: anything with `len` and integer positions, or PyTorch's `DataLoader` of such. Of a
            stream, what `read_stream` has read.
        history: checkpoints of the training, in order, for methods that look at it: what `read_recording` returns, or
            paths of weights.
        execution: how to compute, unless a call says otherwise.

    Raises:
        InputError: `train` is empty, or the model is none.
        LayerError: no layer can be tracked.
    """

    def __init__(
        self,
        path: str | Path,
        model: nn.Module,
        task: Task[Batch],
        *,
        train: DatasetLike,
        history: Sequence[Checkpoint] = (),
        execution: Execution | None = None,
    ) -> None:
        train = indexed("train", train)
        model = unwrapped(model)
        self.path, self.train, self.history = Path(path), train, history
        chosen = select_layers(model, task.layers, task.head(model))
        self._sweep = Sweep(model, task, chosen, execution or Execution())
        self.profile = self._sweep.profile
        self._lock = run_lock(self.path)
        if self._sweep.lockstep:
            _ = self._tracked  # all processes pass through the model here; later, one may ask alone

    @property
    def model(self) -> nn.Module:
        """The trained model."""
        return self._sweep.model

    @property
    def layers(self) -> Mapping[str, TrackedLayer]:
        """The tracked layers by name.

        Unless the task names layers, those that do not run are left out. That takes a forward pass over an example, or
        a few, the first time that it is asked.
        """
        return self._tracked[0]

    @cached_property
    def _tracked(self) -> tuple[Mapping[str, TrackedLayer], str]:
        """The tracked layers, and what is to be said of those that are left out."""
        model, task, chosen = self._sweep.model, self._sweep.task, self._sweep.layers
        layers = self._sweep.running(Examples(self.train, task))
        idle = chosen.keys() - layers.keys()
        said = [never_run(model, chosen, idle), mostly_left_out(model, layers, task.head(model), idle)]
        left_out = ". ".join(each for each in said if each)
        if self._sweep.ranks.is_main:
            logger.info(f"{coverage(model, layers)}.")
            if left_out:
                logger.warning(f"{left_out}.")
        return layers, left_out

    @property
    def execution(self) -> Execution:
        """How it computes, unless a call says otherwise."""
        return self._sweep.execution

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other runs out of the run directory; they wait. What the methods below do, for several calls together.

        Raises:
            StorageError: the directory cannot be written.
        """
        with ExitStack() as stack:
            self._sweep.ranks.first(lambda: stack.enter_context(self._lock))
            yield

    @contextmanager
    def _work(self, what: str) -> Iterator[None]:
        """As `alone`, in the precision that is said here, and say in our words that memory has run out."""
        device = self._sweep.device
        with self.alone(), own_precision(device), within_memory(f"{what} does", device, _MEMORY_ADVICE):
            yield

    @overload
    def score(
        self,
        queries: DatasetLike,
        method: Method | None = None,
        *,
        name: str | None = None,
        overwrite: bool = False,
        execution: Execution | None = None,
    ) -> Scores: ...

    @overload
    def score(
        self,
        queries: DatasetLike,
        method: Method | None = None,
        *,
        keep: Keep[Scores_co],
        name: str | None = None,
        overwrite: bool = False,
        execution: Execution | None = None,
    ) -> Scores_co: ...

    def score(
        self,
        queries: DatasetLike,
        method: Method | None = None,
        *,
        keep: Keep[Any] | None = None,
        name: str | None = None,
        overwrite: bool = False,
        execution: Execution | None = None,
    ) -> Any:
        """Score training examples for queries, or load the scores when they are there; what is missing is fitted first.

        With factors, the preconditioned query gradients stay in memory, as many as fit, and the training set is swept
        once for each such block of queries. Scores are computed in parts and put into a file, so that a large training
        set takes no more memory than a small one.

        Args:
            queries: examples of the kind that the task measures.
            method: how, `EKFAC()` unless given.
            keep: what of the scores: `Pairs()` unless given, `Top(k)`, `Aggregated(...)` or `Tokens(...)`.
            name: of the result in the run directory; by default the method and settings, in a word, and a digest of all
                that the result depends on, so that another damping or other queries lie side by side.
            overwrite: compute it again and replace it, also where it has this name and was made from something else,
                which is refused otherwise. It replaces this result alone: no factors, and no other scores. Where it is
                interrupted, the call without it goes on.
            execution: how to compute; the study's unless given.

        Raises:
            InputError: the method cannot do this, or an argument is impossible.
            WherefromError: see `wherefrom.runtime.errors`; what was finished before stays valid.
        """
        queries = indexed("queries", queries)
        with self._work("score"):
            context = self._context(execution)
            return _checked(method).score(context, queries, keep or Pairs(), name, overwrite)

    def fit(
        self,
        method: Method | None = None,
        *,
        name: str | None = None,
        overwrite: bool = False,
        execution: Execution | None = None,
    ) -> Factors:
        """Fit what a method needs of the training examples before queries are known, or load it when it is there.

        Args:
            method: `EKFAC()` unless given.
            name: of the factors in the run directory; by default "sampled" or "empirical", with "-half" in half
                precision and "-conditioned", and a digest of all that they depend on, so that another seed or training
                set lies side by side. Strategies share what they have in common under one name.
            overwrite: fit again and replace, also what has this name and was made from something else, which is refused
                otherwise. It replaces what the method has, and eigenvalues in a basis that is replaced (`KFAC` has
                the basis of `EKFAC`); nothing of other methods, and no scores. Where it is interrupted, the call
                without it goes on.
            execution: how to compute; the study's unless given.

        Raises:
            WherefromError: see `wherefrom.runtime.errors`; what was finished before stays valid.
        """
        with self._work("fit"):
            return _checked(method).fit(self._context(execution), name, overwrite)

    def plan(
        self,
        queries: DatasetLike,
        method: Method | None = None,
        *,
        keep: Keep[Any] | None = None,
        execution: Execution | None = None,
    ) -> Plan:
        """What `score` would do with these arguments, and what that and the fit would cost, without doing it.

        Returns:
            `str(plan)` is one line, `plan.table()` has the stages with their operations, memory and least time.

        Raises:
            InputError: there are no queries, or the method has no plan.
        """
        queries = indexed("queries", queries)
        return _checked(method).plan(self._context(execution), queries, keep or Pairs())

    def self_influence(
        self,
        method: Method | None = None,
        *,
        name: str | None = None,
        overwrite: bool = False,
        execution: Execution | None = None,
    ) -> Tensor:
        """Each training example's score with itself, g_t^T (H + damping)^-1 g_t, in one sweep; or load them.

        High for examples that the model could only learn by heart: wrong labels, rare cases (Koh & Liang 2017, section
        5.4; Feldman & Zhang 2020). For `Dot()` it is the squared norm of the gradient.

        Args:
            method, name, overwrite, execution: as in `score`; results lie in `RUN/self_influence`.

        Returns:
            [train], in dataset order; float32, or float64 for a float64 model.

        Raises:
            WherefromError: see `wherefrom.runtime.errors`; what was finished before stays valid.
        """
        with self._work("self_influence"):
            return _checked(method).self_influence(self._context(execution), name, overwrite)

    def index(
        self,
        method: Factored | None = None,
        sketch: Sketch | None = None,
        *,
        name: str | None = None,
        overwrite: bool = False,
        execution: Execution | None = None,
    ) -> GradientIndex[Batch]:
        """Store a sketch of every training example's gradient, for queries later; or open what is there.

        Examples that are in the index of this name already are not swept again, wherever they stand in the training
        set; that takes the factors that it was made with, `EKFAC(factors=...)` where others would be fitted.

        Args:
            method: whose scores its answers approximate, with which damping; `EKFAC()` unless given.
            sketch: `Sketch()` unless given.
            name, overwrite, execution: as in `score`; indexes lie in `RUN/index`.

        Raises:
            WherefromError: see `wherefrom.runtime.errors`; what was finished before stays valid.
        """
        with self._work("index"):
            context = self._context(execution)
            return GradientIndex.of(context, method or EKFAC(), sketch or Sketch(), name, overwrite)

    def report(
        self,
        scores: Result,
        queries: DatasetLike | None = None,
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
            scores: what `score` returned for these queries and this study.
            queries: the examples that were scored, for scores that were read from a file; others have them. Their
                columns `text`, `title` and `label` are shown where there are any.
            tokenizer: decodes `input_ids` of examples without `text`, and the tokens that are shaded.
            tokens: what `score(..., keep=Tokens())` returned for these queries; shades the tokens of the pairs that it
                has.
            figures: plots to show, such as those of `report.figures.load_figures`.
            path: the page; `reports/NAME.html` in the run directory by default, with the name of the scores, or the
                method and a digest for scores that are not stored.
            summary: a line below the title.
            k: how many examples of each sign are shown.

        Returns:
            Where the page is.

        Raises:
            MismatchError: the scores are about other queries, another training set or another model.
            WherefromError: an argument does not fit, or the page cannot be written.
        """
        queried, train, shaded = self._texts(scores, queries, tokenizer, tokens)
        if path is None:
            called = scores.name or result_name(scores.fingerprint.get("method", "scores"), scores.fingerprint)
            # Either can come from somebody else's file, and lead elsewhere.
            called = called if is_plain(called) else result_name("scores", scores.fingerprint)
            path = within(self.path, "reports", f"{called}.html")
        path = Path(path)
        page = render_report(
            title=f"Where from? {self.path.name}",
            summary=summary,
            queries=queried,
            train=train,
            scores=scores,
            profile=self.profile.text(),
            tokens=shaded,
            figures=figures,
            k=k,
        )
        with self.alone():
            self._sweep.ranks.first(lambda: write_page(path, page))
        return path

    def show(
        self,
        scores: Result,
        query: int = 0,
        *,
        queries: DatasetLike | None = None,
        tokenizer: Tokenizer | None = None,
        tokens: TokenScores | None = None,
        k: int = 3,
    ) -> View:
        """A query and the training examples behind it, with their texts, for a notebook.

        Args:
            query: its position.
            scores, queries, tokenizer, tokens, k: as in `report`.

        Raises:
            MismatchError: the scores are about other queries, another training set or another model.
            InputError: there is no such query, or an argument does not fit.
        """
        count = len(scores.values)
        check_argument(0 <= query < count, "query", query, f"0 to {count - 1}")
        return query_view(scores, query, *self._texts(scores, queries, tokenizer, tokens), k)

    def _texts(
        self, scores: Result, queries: DatasetLike | None, tokenizer: Tokenizer | None, tokens: TokenScores | None
    ) -> tuple[DatasetPassages, DatasetPassages, DatasetTokens | None]:
        """What scores are shown beside: queries, training examples, and the tokens inside these."""
        if not isinstance(scores, Result):
            raise InputError(
                f"scores: expected what score or GradientIndex.query has returned, not {type(scores).__name__}."
            )
        if tokens is not None and tokenizer is None:
            raise InputError("tokens are given and tokenizer is None: expected the tokenizer that made their text.")
        queries = scores.queries if queries is None else indexed("queries", queries)
        if queries is None:
            raise InputError(
                "queries=None: these scores do not bring their queries; give the examples that were scored."
            )
        if MODEL in scores.fingerprint:
            check_about(scores.fingerprint, {MODEL: model_digest(self._sweep.model)})
        shaded = DatasetTokens(tokens, self.train, tokenizer) if tokens is not None and tokenizer else None
        return DatasetPassages(queries, tokenizer), DatasetPassages(self.train, tokenizer), shaded

    def _context(self, execution: Execution | None) -> Context[Batch]:
        """What a method works with; taken anew for each call, since weights and lists can change."""
        sweep = self._sweep if execution is None else replace(self._sweep, execution=execution)
        if sweep.execution.half_precision and sweep.dtype == torch.float64:
            raise InputError("half_precision=True with a float64 model: load the model in float32, or leave it out.")
        train, states = Examples(self.train, sweep.task), ModelStates(sweep.model)
        fingerprint = self._fingerprint(train, states)
        return Context(self.path, replace(sweep, layers=self.layers), train, self.history, fingerprint, states)

    def _fingerprint(self, train: Examples[Batch], states: ModelStates) -> Mapping[str, str]:
        """What everything in this study depends on."""
        task = {name: value for name, value in checked_settings(self._sweep.task).items() if name != "measure"}
        with self.profile.action("fingerprint"):
            found = {"library": VERSION, MODEL: states.digest(None), "task": json.dumps(task, sort_keys=True)}
            layers, left_out = self._tracked
            found |= {"layers": names_summary(list(layers)), TRAIN: train.digest}
            found |= {LEFT_OUT: left_out} if left_out else {}
        for name, value in found.items():
            self._sweep.ranks.check_alike(name, value)
        return found


def _checked(method: Method | None) -> Method:
    """A method that was given, or EK-FAC.

    Raises:
        InputError: it is none.
    """
    if method is not None and not isinstance(method, Method):
        raise InputError(f"method={method!r}: expected a method, such as EKFAC(), or None for that.")
    return method or EKFAC()
