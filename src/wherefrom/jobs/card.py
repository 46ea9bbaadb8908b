"""A run's scores as a section of a model card: what was attributed, how, how faithful that is, and how to repeat it.

This module knows results and what they were made from; it must not know arguments, and prints nothing.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wherefrom.engine.modules.coverage import coverage
from wherefrom.evaluate.datamodels import IntervalEstimate, evaluate_lds
from wherefrom.evaluate.retrainings import GroundTruth
from wherefrom.jobs.sources import RunSources
from wherefrom.report.html import cleaned, package_templates
from wherefrom.runtime.errors import DamagedError, InputError
from wherefrom.scoring.results import Result, Scores
from wherefrom.store.files import read_json, within
from wherefrom.store.fingerprint import (
    LEFT_OUT,
    MODEL,
    QUERIES,
    TRAIN,
    check_about,
    dataset_digest,
    model_digest,
    unlike,
)
from wherefrom.study import Study

# Entries of a fingerprint that have a line of their own, or say what another does.
_SAID = ("library", MODEL, TRAIN, QUERIES, LEFT_OUT, "method", "layers")


def model_card(
    scores: Result,
    sources: RunSources | None = None,
    study: Study[Any] | None = None,
    lds: Mapping[str, Any] | None = None,
) -> str:
    """The section, in Markdown. Nothing in it that others have named is obeyed as Markdown or HTML.

    Args:
        sources: what the command made the scores from; None for those of a program.
        study: of the same model and training examples, which says what part of the weights is tracked.
        lds: what `measured` or `stored` has found; None says that nobody has measured it.

    Raises:
        MismatchError: the study has another model or other training examples than the scores.
    """
    about = scores.fingerprint
    if study is not None:
        check_about(about, {MODEL: model_digest(study.model), TRAIN: dataset_digest(study.train)})
    commands = () if sources is None else sources.commands
    templates = package_templates().overlay(autoescape=False)
    templates.filters |= {"code": _code, "fenced": _fenced}
    texts = {
        **{name: about.get(name, "unknown") for name in ("library", "method", "layers")},
        "model": about.get(MODEL, "unknown"),
        "folder": "" if sources is None else sources.model,
        "train": about.get(TRAIN, "unknown"),
        "train_names": () if sources is None else sources.train.names,
        "queries": about.get(QUERIES, "unknown"),
        "query_names": () if sources is None or sources.queries is None else sources.queries.names,
        "tracked": "" if study is None else coverage(study.model, study.layers).removeprefix("Tracking "),
        "settings": [(name, value) for name, value in about.items() if name not in _SAID],
        "commands": "\n".join(shlex.join(["wherefrom", *each]) for each in commands),
    }
    found: str = templates.get_template("card.md").render(cleaned(texts), lds=lds)
    return found


def measured(scores: Result, truth: GroundTruth) -> dict[str, Any]:
    """How well scores predict retrainings, for `model_card`.

    Raises:
        InputError: not all pairs are there, or the retrainings are of other numbers of queries or training examples.
    """
    if not isinstance(scores, Scores):
        raise InputError(
            f"{scores.name} holds the highest and lowest scores alone: retrainings need those of all pairs."
        )
    report = evaluate_lds({"scores": scores}, truth)
    ceiling = None if report.ceiling is None else str(report.ceiling)
    counts = {"subsets": report.subsets, "repeats": report.repeats, "queries": len(report.queries["scores"])}
    return {"score": str(report.means["scores"]), "ceiling": ceiling, **counts}


def stored(run: Path, scores: Result) -> dict[str, Any] | None:
    """The same of the evaluations in a run directory that have these scores; None where there is none.

    Raises:
        DamagedError: an evaluation cannot be read.
    """
    for file in sorted(within(run, "evaluation").glob("*.json")):
        content = read_json(file, "Run the evaluation again, or delete it.")
        try:
            if "methods" not in content or unlike(scores.fingerprint, dict(content["about"])):
                continue
            for each in content["methods"].values():
                if scores.name and each.get("scores") == scores.name:
                    ceiling = content["ceiling"] and str(_interval(content["ceiling"]))
                    counts = {"subsets": int(content["subsets"]), "repeats": int(content["repeats"])}
                    return {
                        "score": str(_interval(each)),
                        "ceiling": ceiling,
                        **counts,
                        "queries": len(each["queries"]),
                    }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedError(f"{file} cannot be used: it has no {error}. Run the evaluation again.") from error
    return None


def _interval(found: Mapping[str, Any]) -> IntervalEstimate:
    return IntervalEstimate(*(float(found[name]) for name in ("value", "low", "high")))


def _code(text: str) -> str:
    """A code span, which shows a text as it is, on one line."""
    line = " ".join(text.split()) or "(empty)"
    ticks = "`" * (1 + max((len(each) for each in re.findall("`+", line)), default=0))
    space = " " * (line[0] == "`" or line[-1] == "`")
    return f"{ticks}{space}{line}{space}{ticks}"


def _fenced(text: str) -> str:
    """A block of a shell's lines."""
    fence = "`" * max(3, 1 + max((len(each) for each in re.findall("`+", text)), default=0))
    return f"{fence}bash\n{text}\n{fence}"
