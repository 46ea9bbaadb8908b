"""A dataset file that ends the process: `null` in the place of a row, where Arrow begins (apache/arrow, issue 47409).

What happens: the file is searched for such lines before Arrow reads it, and refused with the number of the line.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from attacks.common import Stop, main, refused
from wherefrom.hf.text import read_dataset

READING = "import sys, pyarrow.json; pyarrow.json.read_json(sys.argv[1])"
ROWS = {"first": 'null\n{"text": "a b"}\n', "indented": ' \tnull\n{"text": "a b"}\n', "last": '{"text": "a b"}\nnull\n'}


def live(folder: Path) -> bool:
    (folder / "rows.jsonl").write_text(ROWS["first"])
    done = subprocess.run([sys.executable, "-c", READING, folder / "rows.jsonl"], capture_output=True, check=False)
    return done.returncode < 0  # ended by a signal


def attack(folder: Path) -> Iterator[Stop]:
    for name, rows in ROWS.items():
        file = folder / f"{name}.jsonl"
        file.write_text(rows)
        yield refused(f"null in the {name} row", partial(read_dataset, str(file)))


if __name__ == "__main__":
    main(live, attack)
