"""What attacks have in common: a payload, how one is judged, and a victim. This module knows no attack."""

from __future__ import annotations

import io
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import wherefrom as wf
from wherefrom.cli.main import main as run_command
from wherefrom.runtime.errors import WherefromError

logger = logging.getLogger("wherefrom")


class SucceededError(AssertionError):
    """An attack was not stopped."""


class HarmlessError(AssertionError):
    """An attack does nothing even where nothing stops it: it proves nothing, and has to be renewed."""


@dataclass(frozen=True)
class Stop:
    """One try that was stopped.

    Attributes:
        tried: what, and where.
        by: what stopped it.
    """

    tried: str
    by: str


Live = Callable[[Path], bool]
Attack = Callable[[Path], Iterator[Stop]]


class Payload:
    """Unpickled, it makes a directory."""

    def __init__(self, mark: Path) -> None:
        self._mark = str(mark)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self._mark,)


def refused(tried: str, work: Callable[[], object], mark: Path | None = None) -> Stop:
    """Do what a victim would; it has to end in one of our errors.

    Args:
        mark: what would be there if the attack had come through.

    Raises:
        SucceededError: it did not end so, or the mark is there.
    """
    try:
        work()
    except WherefromError as error:
        check(mark is None or not mark.exists(), f"{tried}: refused, and yet it was executed")
        return Stop(tried, f"{type(error).__name__}: {error}")
    raise SucceededError(f"{tried}: nothing was refused")


def command_refused(tried: str, *words: str | Path, mark: Path | None = None) -> Stop:
    """The same for `wherefrom` with these words, which has to say why without a traceback."""
    status, printed = command(*words)
    check(status == 1 and "Traceback" not in printed, f"{tried}: exit status {status}, {printed}")
    check(mark is None or not mark.exists(), f"{tried}: refused, and yet it was executed")
    return Stop(tried, " ".join(printed.split()))


def check(stopped: bool, what: str) -> None:
    """Raise SucceededError with what has happened, unless it was stopped."""
    if not stopped:
        raise SucceededError(what)


def stops(live: Live, attack: Attack, folder: Path) -> list[Stop]:
    """Prove that an attack is one, and run it.

    Args:
        folder: an empty one.

    Raises:
        HarmlessError: it is none.
        SucceededError: it was not stopped, or has tried nothing.
    """
    for name in ("live", "attack"):
        (folder / name).mkdir()
    if not live(folder / "live"):
        raise HarmlessError("it does nothing where nothing stops it")
    found = list(attack(folder / "attack"))
    check(bool(found), "nothing was tried")
    return found


def main(live: Live, attack: Attack) -> None:
    """Run one attack from the shell."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = stops(live, attack, Path(folder))
        except (SucceededError, HarmlessError) as error:
            sys.exit(f"{type(error).__name__}: {error}")
    for each in found:
        print(f"{each.tried}\n    stopped by {each.by}")


# The victim.


def command(*words: str | Path) -> tuple[int, str]:
    """Run `wherefrom` with these words: its exit status, and all that it printed."""
    # The variable of the environment comes too late where these are imported already, as in a suite of tests.
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    printed, status = io.StringIO(), 0
    before = list(logger.handlers), logger.level
    given = patch.object(sys, "argv", ["wherefrom", *map(str, words)])
    with given, patch.dict(os.environ), redirect_stdout(printed), redirect_stderr(printed):
        try:
            run_command()
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            logger.handlers, logger.level = before
    return status, printed.getvalue()


def examples(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Points of two classes."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(2, generator=generator), torch.tensor(number % 2)) for number in range(count)]


def linear_model() -> nn.Module:
    """Six weights, the same ones each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2))


def linear_study(run: Path) -> wf.Study[Any]:
    """Its study in a run directory."""
    execution = wf.Execution(progress=False)
    return wf.Study(run, linear_model(), wf.Classification(), train=examples(6), execution=execution)


def save_language_model(folder: Path) -> PreTrainedTokenizerBase:
    """Write a GPT-2 of a few hundred weights into a directory, with a tokenizer of five words, which is returned."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=6, n_positions=16, n_embd=4, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate("?abcde")}, "?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="?")
    tokenizer.save_pretrained(folder)
    return tokenizer


def text_run(
    folder: Path, train: Sequence[str] = ("a b c", "b c d", "c d e"), queries: Sequence[str] = ("a b", "d e")
) -> Path:
    """A run directory with scores of texts, made by the command, in a folder with the model and the texts."""
    save_language_model(folder / "model")
    (folder / "train.txt").write_text("\n\n".join(train))
    (folder / "queries.txt").write_text("\n\n".join(queries))
    run = folder / "run"
    made = [
        command("fit", run, "--model", folder / "model", "--train", folder / "train.txt", "dot"),
        command("score", run, "--queries", folder / "queries.txt", "dot"),
    ]
    if any(status for status, _ in made):
        raise HarmlessError(f"the victim's own run has failed: {made}")
    return run
