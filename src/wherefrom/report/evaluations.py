"""Evaluations of a run: a plot and its numbers side by side in `RUN/evaluation`, which the page shows.

This module knows files and pictures; it must not know what was evaluated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from wherefrom.errors import DamagedError
from wherefrom.files import checked_name, read_json, within, write_bytes, write_text
from wherefrom.report.passages import Figure

_FOLDER = "evaluation"
_ADVICE = "Run the evaluation again, or delete its plot and its numbers."


def save_evaluation(run: str | Path, name: str, figure: Figure, results: Mapping[str, object]) -> Path:
    """Write `RUN/evaluation/NAME.png` and `NAME.json`, and tell where the plot is.

    Args:
        figure: the plot, and what the page says of it.
        results: the numbers behind it, as json writes them.

    Raises:
        StorageError: a file cannot be written.
    """
    file = Path(run) / _FOLDER / f"{checked_name(name)}.png"
    write_bytes(file, figure.png)
    content = {"title": figure.title, "caption": figure.caption, **results}
    write_text(file.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
    return file


def load_figures(run: str | Path) -> list[Figure]:
    """The plots of all evaluations of a run, by name; none where there was no evaluation.

    Raises:
        DamagedError: an evaluation lacks its plot or cannot be read.
    """
    return [_figure(file) for file in sorted((Path(run) / _FOLDER).glob("*.json"))]


def _figure(file: Path) -> Figure:
    try:
        found = read_json(file, _ADVICE)
        plot = within(file.parent, f"{file.stem}.png")
        return Figure(str(found["title"]), str(found["caption"]), plot.read_bytes())
    except (OSError, KeyError) as error:
        raise DamagedError(
            f"{file} and its plot cannot be read ({type(error).__name__}: {error}). {_ADVICE}"
        ) from error
