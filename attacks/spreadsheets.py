"""Formulas in a table: a text, a title or a name that begins with `=`, which a spreadsheet computes when it is opened.

What happens: a table of scores has numbers alone, under four headings of our own; no text and no name is written to it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from attacks.common import Stop, check, command, main, text_run

FORMULA = '=HYPERLINK("https:stranger","a b c")'
HEADINGS = ["query", "rank", "train", "score"]


def live(folder: Path) -> bool:
    """A table that does hold texts has a cell which a spreadsheet takes for a formula."""
    with (folder / "texts.csv").open("w", newline="") as stream:
        csv.writer(stream).writerow([0, 1.5, FORMULA])
    return any(_is_formula(cell) for row in _cells(folder / "texts.csv") for cell in row)


def attack(folder: Path) -> Iterator[Stop]:
    run = text_run(folder, train=[FORMULA, "@a b c", "+a b c"], queries=["-a b", FORMULA])
    (manifest,) = (run / "scores").glob("*/manifest.json")
    check(FORMULA not in json.loads(manifest.read_text())["name"], "the scores are called after a text")
    status, printed = command("export", run, "--output", folder / "scores.csv")
    check(status == 0, f"the export has failed: {printed}")
    headings, *rows = _cells(folder / "scores.csv")
    check(headings == HEADINGS and len(rows) == 6, f"the table has the headings {headings} and {len(rows)} rows")
    formulas = [cell for row in rows for cell in row if _is_formula(cell)]
    check(not formulas, f"a spreadsheet would compute {formulas}")
    yield Stop("formulas as training texts and queries", f"`wherefrom export` writes numbers, such as {rows[0]}")


def _cells(file: Path) -> list[list[str]]:
    with file.open(newline="") as stream:
        return list(csv.reader(stream))


def _is_formula(cell: str) -> bool:
    """Whether a spreadsheet takes a cell for more than a number or a word."""
    try:
        float(cell)
    except ValueError:
        return cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    return False


if __name__ == "__main__":
    main(live, attack)
