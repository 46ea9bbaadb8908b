"""The subcommand `wherefrom card`: a section for a model card. It only turns arguments into calls of the library."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from wherefrom.cli.shared import Run
from wherefrom.engine.execution import Execution
from wherefrom.evaluate.retrainings import GroundTruth
from wherefrom.jobs.card import measured, model_card, stored
from wherefrom.jobs.sources import SOURCES, RunSources, chosen_scores
from wherefrom.runtime.distributed import Ranks
from wherefrom.runtime.errors import InputError, check_argument
from wherefrom.scoring.results import load_scores
from wherefrom.store.files import write_text

console = Console(stderr=True)


def card(
    run: Run,
    *,
    name: str | None = None,
    retrainings: Path | None = None,
    out: Path | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Print a section for a model card: what was attributed, by which method, how faithful that is.

    Args:
        run: A run directory with scores.
        name: Of the scores, or what it begins with before the digest; by default the latest.
        retrainings: A folder of finished retrainings, or their file, to measure on; an evaluation of these scores that
            lies in the run is found without.
        out: Write it to this file too, which must not be there yet.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', ...
        trust_remote_code: Run Python code that comes with the model, as for `wherefrom fit`.
    """
    Ranks.current().check_alone("card")
    if out is not None:
        check_argument(out.suffix == ".md", "out", str(out), "a file that ends in .md")
        if out.exists():
            raise InputError(f"{out} is there already: choose another name, and copy the section into it.")
    folder = chosen_scores(run, name)
    scores = load_scores(folder)
    lds = stored(run, scores) if retrainings is None else measured(scores, GroundTruth.load(retrainings))
    sources = study = None
    if (folder / SOURCES).exists():
        sources = RunSources.of_result(folder, trust_remote_code)
        study = sources.study(run, device, Execution(progress=False))
    text = model_card(scores, sources, study, lds)
    sys.stdout.write(text)
    if out is not None:
        write_text(out, text)
        console.print(f"Written: {out}", soft_wrap=True, highlight=False)
