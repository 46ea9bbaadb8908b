"""What a person has decided about training examples, kept in the run directory.

This module knows positions and words; it must not know scores.
"""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from wherefrom.runtime.errors import DamagedError, check_argument
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
