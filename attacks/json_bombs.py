"""JSON that takes all memory, all of the stack, or is no JSON that anybody would write.

What happens: files of more than 16 MiB are not read; nesting, numbers of thousands of digits, infinities and values of
another type than was written are refused by the name of the file.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import wherefrom as wf
from attacks.common import Stop, check, examples, linear_study, main, refused, save_language_model
from wherefrom.jobs.sources import SOURCES, RunSources
from wherefrom.scoring.results import Scores
from wherefrom.store.files import read_json

DEEP = b'{"a":' * 200_000
LARGE = b'{"a": "' + b"x" * 2**24 + b'"}'
BOMBS = {
    "200,000 levels": DEEP,
    "17 MiB": LARGE,
    "a number of 10,000 digits": b'{"format": ' + b"9" * 10_000 + b"}",
    "an infinite number": b'{"format": 1e999}',
    "an infinite step": b'{"format": 1, "checkpoints": [{"name": "a", "step": 1e999}]}',
    "a step that is no number": b'{"format": 1, "checkpoints": [{"name": "a", "step": NaN}]}',
    "a list": b"[" * 500 + b"]" * 500,
    "bytes that are no text": b"\xff\xfe{}",
    "nothing": b"",
}


def live(folder: Path) -> bool:
    (folder / "large.json").write_bytes(LARGE)
    deep = _ends_with(RecursionError, lambda: json.loads(DEEP))
    infinite = _ends_with(OverflowError, lambda: int(json.loads("1e999")))
    return deep and infinite and _peak(lambda: json.loads((folder / "large.json").read_bytes())) > 2**24


def attack(folder: Path) -> Iterator[Stop]:
    study = linear_study(folder / "run")
    result = folder / "run" / "scores" / study.score(examples(2), wf.Dot()).name
    readers: dict[Path, Callable[[], object]] = {
        result / "manifest.json": lambda: Scores.load(result),
        folder / "run" / SOURCES: lambda: RunSources.load(folder / "run"),
        folder / "wherefrom.json": lambda: wf.read_recording(folder),
        folder / "model.safetensors.index.json": lambda: study.score(examples(2), wf.TracIn(checkpoints=[folder])),
    }
    for file, read in readers.items():
        before = file.read_bytes() if file.exists() else None
        for name, content in BOMBS.items():
            file.write_bytes(content)
            yield refused(f"{name} as {file.name}", read)
        file.unlink() if before is None else file.write_bytes(before)
    (folder / "large.json").write_bytes(LARGE)
    peak = _peak(lambda: refused("", lambda: read_json(folder / "large.json")))
    check(peak < 2**20, f"{peak:,} bytes were taken for a file that is refused")
    yield Stop("the memory for a file of 17 MiB", f"its size: {peak:,} bytes were taken")
    yield from _sources(folder)
    yield _tools(folder / "model")


def _sources(folder: Path) -> Iterator[Stop]:
    """Values of another type in what names a run's model and texts."""
    text = {"source": "train.txt", "split": "train", "column": None, "unit": "documents", "length": 12}
    run = {"model": "model", "layers": None, "train": text, "empirical": False, "seed": 0, "queries": None}
    for changed in ({"model": 5}, {"layers": "all"}, {"seed": 1e999}, {"train": {**text, "length": "9"}}):
        (folder / SOURCES).write_text(json.dumps({"format": 2, **run, **changed}))
        yield refused(f"{next(iter(changed))} of another type in {SOURCES}", lambda: RunSources.load(folder))


def _tools(model: Path) -> Stop:
    """A column of a dataset that holds JSON."""
    tokenizer = save_language_model(model)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(model)
    row = {"messages": [{"role": "user", "content": "a b"}], "tools": DEEP.decode()}
    return refused("200,000 levels as the tools of a conversation", lambda: wf.study_from_pretrained(model, [row]))


def _ends_with(error: type[Exception], work: Callable[[], object]) -> bool:
    try:
        work()
    except error:
        return True
    return False


def _peak(work: Callable[[], object]) -> int:
    """The most bytes that Python holds meanwhile."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


if __name__ == "__main__":
    main(live, attack)
