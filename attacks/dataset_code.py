"""A dataset that brings code: a loading script beside its files, and a pickle in the type of a Parquet column.

What happens: the `datasets` library runs no scripts since its version 4, the lowest that is allowed here, and the
folder is refused. Arrow unpickled the types of columns before version 14.0.1 (CVE-2023-47248); the versions that
`datasets` 4 asks for read the column as what it is stored as, and the pickle is not run.
"""

from __future__ import annotations

import pickle
import runpy
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from attacks.common import Payload, Stop, check, main, refused
from wherefrom.hf.text import read_dataset


def live(folder: Path) -> bool:
    runpy.run_path(str(_script(folder, folder / "first") / "corpus.py"))
    field = pq.read_schema(_parquet(folder, folder / "second")).field("text")
    pickle.loads(field.metadata[b"ARROW:extension:metadata"])
    return (folder / "first").exists() and (folder / "second").exists()


def attack(folder: Path) -> Iterator[Stop]:
    mark = folder / "executed"
    script = _script(folder, mark)
    yield refused("a folder with a loading script", lambda: read_dataset(str(script)), mark)
    yield refused("the script itself", lambda: read_dataset(str(script / "corpus.py")), mark)
    texts = read_dataset(str(_parquet(folder, mark)))["text"][:]
    check(texts == ["a b", "c d"] and not mark.exists(), f"a column's type was unpickled: {texts}")
    yield Stop("a pickle as the type of a Parquet column", "Arrow, which reads the column as text and leaves the type")


def _script(folder: Path, mark: Path) -> Path:
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "corpus.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    (corpus / "data.jsonl").write_text('{"text": "a b"}\n')
    return corpus


def _parquet(folder: Path, mark: Path) -> Path:
    named = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Payload(mark)),
    }
    schema = pa.schema([pa.field("text", pa.string(), metadata=named)])
    pq.write_table(pa.table({"text": ["a b", "c d"]}, schema=schema), folder / "rows.parquet")
    return folder / "rows.parquet"


if __name__ == "__main__":
    main(live, attack)
