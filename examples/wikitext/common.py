"""What the scripts that run after `train.py` share: their options, and the study of a checkpoint."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar, cast

import tyro
from datasets import Dataset, disable_progress_bars
from models import load_example
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

import wherefrom as wf
from wherefrom.cli.shared import command_line
from wherefrom.runtime.progress import show_log

console = Console()

Options = TypeVar("Options")

StrategyName = Literal["identity", "diagonal", "kfac", "ekfac", "shampoo"]

METHODS: dict[str, type[wf.Factored]] = {
    "identity": wf.Dot,
    "diagonal": wf.Diagonal,
    "kfac": wf.KFAC,
    "ekfac": wf.EKFAC,
    "shampoo": wf.Shampoo,
}


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
        execution = wf.Execution(
            query_batch_size=options.query_batch_size,
            train_batch_size=options.train_batch_size,
            memory_budget=options.memory_budget,
            compile_activations=options.use_compile,
        )
        self.study, self.queries = load_example(options.checkpoint_dir, options.run_dir, execution)
        self.train, self.tokenizer = cast(Dataset, self.study.train), self.study.tokenizer
        self._fitted: dict[tuple[str, bool], wf.Factors] = {}

    def method(self, strategy: str, query_rank: int | None = None) -> wf.Factored:
        """How a strategy scores, at the damping of the options."""
        return METHODS[strategy](damping=self._options.damping, query_rank=query_rank)

    def execution(self, half_precision: bool) -> wf.Execution:
        """How it is computed."""
        return replace(self.study.execution, half_precision=half_precision)

    def scores(self, method: wf.Factored, half_precision: bool = False) -> wf.Scores:
        """Score all queries, or load the scores."""
        return self.study.score(
            self.queries,
            self._with_factors(method, half_precision),
            overwrite=self._options.overwrite,
            execution=self.execution(half_precision),
        )

    def token_scores(self, method: wf.Factored, half_precision: bool, top: int) -> wf.TokenScores:
        """Score the tokens of each query's most positive and most negative sequences, or load those scores."""
        return self.study.score(
            self.queries,
            self._with_factors(method, half_precision),
            keep=wf.Tokens(top),
            overwrite=self._options.overwrite,
            execution=self.execution(half_precision),
        )

    def _with_factors(self, method: wf.Factored, half_precision: bool) -> wf.Factored:
        """With `overwrite`, factors are fitted again once, however many scores are made with them."""
        key = (method.strategy, half_precision)
        if key not in self._fitted:
            self._fitted[key] = self.study.fit(
                method, overwrite=self._options.overwrite, execution=self.execution(half_precision)
            )
        return replace(method, factors=self._fitted[key])


def command() -> str:
    """What a shell calls the command `wherefrom` of this environment."""
    script = Path(sys.executable).with_name("wherefrom")
    if not script.exists() or shutil.which("wherefrom") == str(script):
        return "wherefrom"
    here = Path.cwd()
    return str(script.relative_to(here) if script.is_relative_to(here) else script)


def run(main: Callable[[Options], None], options: type[Options]) -> None:
    """Read the command line and run a script; errors of ours are one line."""
    disable_progress_bar()
    disable_progress_bars()
    show_log()
    chosen = tyro.cli(options, use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,))
    with command_line():
        main(chosen)
