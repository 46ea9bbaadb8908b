"""What a person has decided about training examples, kept in the run directory, and files without what was dropped.

This module knows positions, words and files; it must not know scores.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from wherefrom.hf.preparation import Source
from wherefrom.runtime.errors import DamagedError, InputError, check_argument
from wherefrom.store.files import read_json, within, write_text
from wherefrom.store.locks import DirectoryLock

Verdict = Literal["keep", "fix", "drop"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
LONGEST_NOTE = 2000  # characters
_FOLDER, _FORMAT = "judgements", 1


@dataclass(frozen=True)
class Judgement:
    """What is to become of a training example, and why.

    Attributes:
        train: its position.
        verdict: empty where there is a note alone.
    """

    train: int
    verdict: Verdict | Literal[""] = ""
    note: str = ""

    def __post_init__(self) -> None:
        known = ("", *VERDICTS)
        check_argument(self.verdict in known, "verdict", self.verdict, f"one of {', '.join(VERDICTS)}, or nothing")
        check_argument(
            len(self.note) <= LONGEST_NOTE, "note", f"{self.note[:40]}…", f"{LONGEST_NOTE} characters at most"
        )


class Judgements:
    """The judgements of one training set, in `RUN/judgements/train-DIGEST8.json`; several servers may share them.

    Args:
        digest: of the training set; another one has judgements of its own.
        count: of its examples.
    """

    def __init__(self, run: Path, digest: str, count: int) -> None:
        self._run, self._digest, self._count = run, digest, count
        self._thread = threading.Lock()

    @property
    def file(self) -> Path:
        """Where they are."""
        return within(self._run, _FOLDER, f"train-{self._digest[:8]}.json")

    def read(self) -> dict[int, Judgement]:
        """All of them, by position.

        Raises:
            DamagedError: the file cannot be used.
        """
        file, advice = self.file, "Move it away to begin anew."
        if not file.exists():
            return {}
        content = read_json(file, advice)
        try:
            found = {each.train: each for each in (Judgement(**each) for each in content["judgements"])}
            fits = content["format"] == _FORMAT and content["train"] == self._digest
            if not fits or not all(self._is_position(each) for each in found):
                raise ValueError("another format or training set")
            return dict(sorted(found.items()))
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"{file} cannot be used ({error}). {advice}") from error

    def judge(self, judgement: Judgement) -> None:
        """Keep a judgement in the place of the one that there was; without verdict and note there is none.

        Raises:
            InputError: there is no such training example.
            StorageError: the file cannot be written.
        """
        last = self._count - 1
        check_argument(self._is_position(judgement.train), "train", judgement.train, f"a position from 0 to {last}")
        with self._thread, DirectoryLock(within(self._run, _FOLDER) / ".lock"):
            found = {**self.read(), judgement.train: judgement}
            if not judgement.verdict and not judgement.note:
                del found[judgement.train]
            remaining = [asdict(each) for _, each in sorted(found.items())]
            content = {"format": _FORMAT, "train": self._digest, "judgements": remaining}
            write_text(self.file, json.dumps(content, indent=1) + "\n")

    def _is_position(self, train: object) -> bool:
        return isinstance(train, int) and not isinstance(train, bool) and 0 <= train < self._count


def filtered(source: Source, name: str, dropped: Collection[int]) -> tuple[str, bytes]:
    """A source of training examples without some of them, in the format that it came in.

    Lines of .jsonl and texts of .txt stay as they are, byte by byte; what came otherwise is written as .jsonl.

    Args:
        source: the examples as they were read.
        name: the file, saved dataset or hub name that they were read from.
        dropped: positions in it.

    Returns:
        A name for the file, and what is in it.

    Raises:
        InputError: the file is not what was read any more, or its columns cannot be written.
    """
    file, count = Path(name).expanduser(), len(source.examples)
    called = re.sub(r"[^\w.-]+", "-", file.stem) or "train"
    if file.is_file() and file.suffix in (".jsonl", ".txt"):
        pattern = rb"\n" if file.suffix == ".jsonl" else rb"\n(?:[^\S\n]*\n)+"
        parts = [part for part in re.split(pattern, file.read_bytes()) if part.strip()]
        if len(parts) == count:
            between = b"\n" if file.suffix == ".jsonl" else b"\n\n"
            remaining = [part.strip(b"\r\n") for position, part in enumerate(parts) if position not in dropped]
            return f"{called}-filtered{file.suffix}", b"".join(part + between for part in remaining)
        if file.suffix == ".txt":
            raise InputError(
                f"{name} has {len(parts)} texts, and had {count} when it was read: start the server again."
            )
    remaining_examples = (source.examples[position] for position in range(count) if position not in dropped)
    try:
        lines = [json.dumps(dict(each), ensure_ascii=False, allow_nan=False) + "\n" for each in remaining_examples]
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} has columns that JSON cannot hold ({error}): export the judgements.") from error
    return f"{called}-filtered.jsonl", "".join(lines).encode()


def dropped_of_each(sources: Sequence[Source], dropped: Collection[int]) -> list[set[int]]:
    """The dropped positions of each source, counted from its own beginning; the sources follow one another."""
    found, start = [], 0
    for source in sources:
        stop = start + len(source.examples)
        found.append({each - start for each in dropped if start <= each < stop})
        start = stop
    return found
