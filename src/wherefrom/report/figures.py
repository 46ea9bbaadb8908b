"""Plots of a run: each lies beside its numbers in `RUN/evaluation`, and pages of the same scores show it.

This module knows files and pictures; it must not know what was evaluated.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from wherefrom.runtime.errors import DamagedError
from wherefrom.store.files import checked_name, read_bytes, read_json, within, write_bytes, write_text
from wherefrom.store.fingerprint import Fingerprint, subjects, unlike
from wherefrom.store.names import result_name

logger = logging.getLogger("wherefrom")

_FOLDER = "evaluation"
_ADVICE = "Run the evaluation again, or delete its plot and its numbers."


@dataclass(frozen=True)
class Figure:
    """A plot shown on the page: `png` bytes."""

    title: str
    caption: str
    png: bytes


def save_evaluation(
    run: str | Path, name: str, figure: Figure, results: Mapping[str, object], about: Fingerprint
) -> Path:
    """Write `RUN/evaluation/NAME-DIGEST8.png` and `.json`, and tell where the plot is.

    Args:
        figure: the plot, and what the page says of it.
        results: the numbers behind it, as json writes them.
        about: the fingerprint of the scores that were evaluated, whose queries, training examples and model the plot is
            then shown with, and with no others; the digest is of these. With an empty one it has no digest in its name,
            and is shown with any.

    Raises:
        StorageError: a file cannot be written.
    """
    found = subjects(about)
    called = result_name(checked_name(name), found) if found else checked_name(name)
    file = within(Path(run), _FOLDER, f"{called}.png")
    write_bytes(file, figure.png)
    content = {"title": figure.title, "caption": figure.caption, **results, "about": found}
    write_text(file.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
    return file


def load_figures(run: str | Path, about: Fingerprint) -> list[Figure]:
    """The plots of a run's evaluations that go with scores, by name; none where there was no evaluation.

    Args:
        about: the fingerprint of the scores; plots about other queries, training examples or models are left out, and
            the log names them.

    Raises:
        DamagedError: an evaluation lacks its plot or cannot be read.
    """
    figures = []
    for file in sorted(within(Path(run), _FOLDER).glob("*.json")):
        content, png = read_json(file, _ADVICE), read_bytes(file.with_suffix(".png"), _ADVICE)
        try:
            figure = Figure(str(content["title"]), str(content["caption"]), png)
            different = unlike(about, dict(content["about"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"{file} cannot be used: it has no {error}. {_ADVICE}") from error
        if different:
            logger.info(f"{file.with_suffix('.png')} is left out: {'; '.join(different)}.")
        else:
            figures.append(figure)
    return figures
