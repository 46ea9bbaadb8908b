"""What a day has found: a table for the terminal, and the file that the pages are made from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_stages.report import failed, write_json

RESULTS = Path(__file__).parents[1] / "results"

Stages = Mapping[str, Mapping[str, Any]]


def print_table(stages: Stages) -> None:
    """Every part with what it has found, each on one line; plain without rich."""
    rows = [row for name, stage in stages.items() for row in _rows(name, stage)]
    headings = ("stage", "part", "state", "s", "found")
    try:
        from rich.console import Console  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415
    except ModuleNotFoundError:
        print("\n".join(" | ".join(row) for row in (headings, *rows)))
        return
    table = Table(*headings, title="The day", title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table, markup=False)


def _rows(name: str, stage: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    yield name, "", str(stage["state"]), f"{stage.get('seconds', 0):.1f}", ""
    for part, found in stage.get("parts", {}).items():
        state = "failed" if failed(found) else "left out" if "unavailable" in found else ""
        yield "", part, state, f"{found['seconds']:.1f}", _found(found)


def _found(part: Mapping[str, Any]) -> str:
    """The last line of an error, the reason for what is left out, or the plain numbers of the figures."""
    if "error" in part:
        return str(part["error"]).splitlines()[-1]
    if "unavailable" in part:
        return str(part["unavailable"])
    return ", ".join(f"{key} {_short(value)}" for key, value in _numbers(part["figures"]))


def _numbers(figures: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    for name, value in figures.items():
        if isinstance(value, Mapping) and name not in ("workload", "machine"):
            yield from _numbers(value, f"{before}{name}: ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield before + name, value


def _short(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 1000 and abs(number) < 1e7 else f"{number:.4g}"


@dataclass(frozen=True)
class Card:
    """A GPU's results, as the pages look at them: what was not measured is None or empty there."""

    result: Mapping[str, Any]

    @property
    def name(self) -> str:
        """As the driver says it."""
        return str(self.result["machine"]["gpu"])

    def parts(self, stage: str) -> Mapping[str, Mapping[str, Any]]:
        """All parts of a stage."""
        found: Mapping[str, Mapping[str, Any]] = self.result["stages"].get(stage, {}).get("parts", {})
        return found

    def part(self, stage: str, part: str) -> Mapping[str, Any] | None:
        """The figures of a part."""
        found: Mapping[str, Any] | None = self.parts(stage).get(part, {}).get("figures")
        return found

    def outcome(self, stage: str) -> str:
        """How many of its parts have passed, and what has not."""
        parts = self.parts(stage)
        wrong = [name for name, part in parts.items() if failed(part)]
        left_out = [name for name, part in parts.items() if "unavailable" in part]
        done = (
            f"{self.result['stages'][stage]['state']}, {len(parts) - len(wrong) - len(left_out)} of {len(parts)} parts"
        )
        told = [f"failed: {', '.join(wrong)}"] * bool(wrong) + [f"left out: {', '.join(left_out)}"] * bool(left_out)
        return "; ".join([done, *told])


def cards(results: Mapping[str, Mapping[str, Any]]) -> list[Card]:
    """Those of the results that are of a GPU, by the names of their files."""
    return [Card(result) for name, result in results.items() if name.startswith("gpu_")]


def merged(indexes: Sequence[Path]) -> dict[str, Any]:
    """Several indexes as one: a stage that is done before one that is not, and else the last."""
    found: dict[str, Any] = {"commands": [], "stages": {}}
    for index in indexes:
        stored = json.loads(index.read_text())
        found["commands"].append(stored["command"])
        for name, stage in stored["stages"].items():
            if stage["state"] == "done" or found["stages"].get(name, {}).get("state") != "done":
                found["stages"][name] = stage
    return found


def kept(indexes: Sequence[Path]) -> Path:
    """Write `results/gpu_CARD.json`; returns where."""
    found = merged(indexes)
    parts = found["stages"]["environment"]["parts"]
    provenance = parts["provenance"]["figures"]
    card = provenance["machine"].get("gpu")
    if card is None:
        raise SystemExit(f"{indexes[0]} is of a rehearsal on a CPU, whose figures are not kept.")
    file = RESULTS / f"gpu_{re.sub(r'[^A-Za-z0-9]+', '_', card)}.json"
    write_json(file, {**provenance, "command": "; ".join(found["commands"]), "stages": found["stages"]})
    return file
