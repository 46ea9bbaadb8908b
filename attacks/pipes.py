"""A named pipe in the place of a file: opening it would wait for ever.

What happens: what is no file is refused before it is opened.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import wherefrom as wf
from attacks.common import Stop, examples, linear_study, main, refused
from wherefrom.jobs.sources import SOURCES, RunSources
from wherefrom.scoring.results import Scores


def live(folder: Path) -> bool:
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    reader = threading.Thread(target=pipe.read_bytes, daemon=True)
    reader.start()
    reader.join(0.2)
    waits = reader.is_alive()
    pipe.write_bytes(b"")  # lets it go on
    reader.join()
    return waits


def attack(folder: Path) -> Iterator[Stop]:
    run = folder / "run"
    study = linear_study(run)
    result = run / "scores" / study.score(examples(2), wf.Dot()).name
    for name in ("manifest.json", "tensors.safetensors", "matrices.safetensors"):
        content = (result / name).read_bytes()
        (result / name).unlink()
        os.mkfifo(result / name)
        yield refused(f"a pipe as {name}", lambda: Scores.load(result))
        (result / name).unlink()
        (result / name).write_bytes(content)
    os.mkfifo(run / SOURCES)
    yield refused(f"a pipe as {SOURCES}", lambda: RunSources.load(run))


if __name__ == "__main__":
    main(live, attack)
