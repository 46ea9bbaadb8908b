"""Escape sequences in texts, labels, names and manifests: they rename the window, clear the screen, or make links.

What happens: in tables, logs and messages of errors, control characters stand as pictures of themselves (`␛`), also in
the traceback of an error that nobody has caught.
"""

from __future__ import annotations

import io
import json
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console, RenderableType
from rich.text import Text

import wherefrom as wf
from attacks.common import Stop, check, command, examples, linear_study, main, text_run
from wherefrom.report.passages import Passage
from wherefrom.report.reading import reading
from wherefrom.report.text import heat_map, hits_table, top_tables
from wherefrom.runtime.errors import WherefromError

SEQUENCES = {
    "the window's title": "\x1b]0;stranger\x07",
    "a cleared screen": "\x1b[2J\x1b[H",
    "a link": "\x1b]8;;https:stranger\x1b\\click\x1b]8;;\x1b\\",
    "one letter that begins a sequence": "\x9b31m",
    "a line written over": "true\rfalse\b\b",
}
ALL = "".join(SEQUENCES.values())
# Of these, rich writes escape and the letters of line ends itself: nothing of ours has colours here.
CONTROLS = {chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))} - {"\n"}


def live(folder: Path) -> bool:
    return "\x1b]0;stranger" in _printed(Text(ALL)) and "\x9b" in _printed(Text(ALL))


def attack(folder: Path) -> Iterator[Stop]:
    passages = [Passage(ALL, ALL, ALL)] * 3
    scores = wf.Scores(torch.ones(1, 3), {"method": ALL})
    found = [wf.Found(1, 0, 1.0, passages[0], [(ALL, 1.0)], [(2, 5)])]
    groups = [wf.GroupScore(0, ALL, 1, 1.0, 1.0)]
    read = reading(scores)
    answer = wf.Attribution(ALL, ALL, (0, 5), ALL, ALL, ALL, read, False, found, found, found, groups, ALL, 3, 3)
    shown: dict[str, RenderableType] = {
        "texts and labels in a table": top_tables(scores, passages[:1], passages, shown=[0]),
        "a list of training sequences": hits_table(None, scores.top(3), passages, read),
        "shaded tokens": heat_map([(ALL, 1.0)]),
        "an answer and what is behind it": answer.shown(),
    }
    for name, table in shown.items():
        yield _plain(name, _printed(table))
    yield _message(folder)
    yield _log(folder / "texts")


def _message(folder: Path) -> Stop:
    """A manifest that names what its scores were made from, as an error quotes it."""
    study = linear_study(folder / "run")
    scores = study.score(examples(2), wf.Dot(), name="scores")
    _forge(folder / "run" / "scores" / scores.name / "manifest.json")
    try:
        study.score(examples(2), wf.Dot(), name="scores")
    except WherefromError as error:
        return _plain("what scores were made from, in a traceback", "".join(traceback.format_exception(error)))
    raise AssertionError("a manifest was changed, and nothing noticed")


def _log(folder: Path) -> Stop:
    """The command's log says what the result beside a new one was made from."""
    run = text_run(folder)
    (manifest,) = (run / "scores").glob("*/manifest.json")
    _forge(manifest)
    status, printed = command("score", run, "--queries", folder / "train.txt", "dot")
    check(
        status == 0 and "what is beside it stays" in " ".join(printed.split()),
        f"the log says nothing of the other: {printed}",
    )
    return _plain("what other scores were made from, in the log", printed)


def _forge(manifest: Path) -> None:
    found = json.loads(manifest.read_text())
    found["fingerprint"]["damping"] = ALL
    manifest.write_text(json.dumps(found))


def _plain(name: str, printed: str) -> Stop:
    found = sorted(CONTROLS & set(printed))
    check(not found, f"{name}: {found} reach the terminal")
    check("␛" in printed, f"{name}: the sequences are not shown: {printed}")
    shown = next(word for word in printed.split() if "␛" in word)
    return Stop(f"{', '.join(SEQUENCES)}: in {name}", f"pictures: {shown[:40]}")


def _printed(table: RenderableType) -> str:
    """What a terminal without colours gets."""
    stream = io.StringIO()
    Console(file=stream, force_terminal=True, color_system=None, width=200, legacy_windows=False).print(table)
    return stream.getvalue()


if __name__ == "__main__":
    main(live, attack)
