"""What the scripts that run after `train.py` share: their options, and the study of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import tyro
from datasets import Dataset
from models import load_example
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

import wherefrom as wf
from wherefrom.cli.shared import command_line
from wherefrom.planning.plan import Plan
from wherefrom.runtime.progress import show_log

console = Console()

Options = TypeVar("Options")


@dataclass
class Common:
    """Options of every script."""

    checkpoint_dir: Path = Path("checkpoints")
    """What train.py wrote."""
    run_dir: Path = Path("runs/wikitext")
    """Keeps factors, scores, retrainings and reports; what is there already is reused."""
    damping: float | None = 1e-8
    """Added to every eigenvalue; None is 0.1 x the mean eigenvalue of each layer. evaluate_lds.py compares them."""
    query_batch_size: int = 32
    train_batch_size: int = 64
    memory_budget: float | None = None
    """GiB to take on the device beyond the model and its factors; most of what is free by default."""
    use_compile: bool = False
    """Run activation functions through torch.compile: passes are faster, after some seconds of compiling."""
    overwrite: bool = False
    """Compute factors and scores again, and replace those that are there."""


class Example:
    """A checkpoint of `train.py` and its study."""

    def __init__(self, options: Common) -> None:
        self._options = options
        self.tokenizer: PreTrainedTokenizerBase
        self.train: Dataset
        self.queries: Dataset
        model, self.tokenizer, self.train, self.queries = load_example(options.checkpoint_dir)
        self.study = wf.Study(
            options.run_dir,
            model,
            wf.CausalLM(),
            train=self.train,
            execution=wf.Execution(memory_budget=options.memory_budget, compile_activations=options.use_compile),
        )
        self._factors: dict[tuple[str, bool], wf.Factors] = {}

    def factors(self, strategy: str, half_precision: bool = False) -> wf.Factors:
        """Fit, or load; once, however many scores are made with them."""
        key = (strategy, half_precision)
        if key not in self._factors:
            size, overwrite = self._options.train_batch_size, self._options.overwrite
            self._factors[key] = self.study.fit(
                factored(strategy),
                overwrite=overwrite,
                execution=replace(self.study.execution, half_precision=half_precision, train_batch_size=size),
            )
        return self._factors[key]

    def plan(self, strategy: str, half_precision: bool, rank: int | None) -> Plan:
        """What fitting and scoring would do, and cost."""
        return self.study.plan(
            self.queries,
            strategy,
            half_precision=half_precision,
            query_rank=rank,
            query_batch_size=self._options.query_batch_size,
            train_batch_size=self._options.train_batch_size,
        )

    def scores(self, strategy: str, *, half_precision: bool = False, rank: int | None = None) -> wf.Scores:
        """Score all queries at the damping of the options, or load the scores."""
        return self.damped_scores(strategy, self._options.damping, half_precision=half_precision, rank=rank)

    def damped_scores(
        self,
        strategy: str,
        damping: float | None,
        *,
        half_precision: bool = False,
        rank: int | None = None,
    ) -> wf.Scores:
        """Score all queries at another damping."""
        options = self._options
        return self.study.score(
            self.queries,
            with_factors(self.factors(strategy, half_precision), damping=damping, query_rank=rank),
            overwrite=options.overwrite,
            execution=replace(
                self.study.execution,
                half_precision=half_precision,
                query_batch_size=options.query_batch_size,
                train_batch_size=options.train_batch_size,
            ),
        )

    def token_scores(self, strategy: str, half_precision: bool, top: int, rank: int | None = None) -> wf.TokenScores:
        """Score the tokens of each query's most positive and most negative sequences, or load those scores."""
        options = self._options
        return self.study.score(
            self.queries,
            with_factors(self.factors(strategy, half_precision), damping=options.damping, query_rank=rank),
            keep=wf.Tokens(top),
            overwrite=options.overwrite,
            execution=replace(
                self.study.execution,
                half_precision=half_precision,
                query_batch_size=options.query_batch_size,
                train_batch_size=options.train_batch_size,
            ),
        )


def run(main: Callable[[Options], None], options: type[Options]) -> None:
    """Read the command line and run a script; errors of ours are one line."""
    disable_progress_bar()
    show_log()
    chosen = tyro.cli(options, use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,))
    with command_line():
        main(chosen)
