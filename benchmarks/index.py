"""What an index of gradients finds, what its scores predict, and how fast it answers, against bytes an example.

    make index      # after `make demo` and `make leaderboard`; parts by --parts recall lds focus latency

Recall is that of the example's trained model on its own text: of each query's exact ten highest scores of EK-FAC, how
many the index has among its own, and after its 50 highest are scored again. LDS is that of the leaderboard's
retrainings (protocol B), and once more by the focus of the sketch. Latency is that of random bits, for queries that
have their sketch. Written to `results/index.json`, and drawn as `docs/images/index.png`.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from low_rank import top_overlap
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from workload import RESULTS, ROOT, provenance, save_results

import wherefrom as wf
from wherefrom.evaluate.datamodels import evaluate_lds
from wherefrom.evaluate.plots import BLUE, GREY, INK, ORANGE, RESOLUTION, SPARE_COLOURS
from wherefrom.methods.index.search import Search
from wherefrom.methods.index.sketches import Bits, Sketch
from wherefrom.methods.index.store import Shard

sys.path.append(str(ROOT / "examples" / "wikitext"))

Study = wf.Study[dict[str, Tensor]]
SKETCHES: tuple[tuple[int, Bits], ...] = ((4096, 1), (16_384, 1), (32_768, 1), (65_536, 1), (4096, 8), (65_536, 8))
RANKS = (4, 16)
# Of how much a focus leaves out and a sketch adds: one counter for each weight, then fewer, then fewer bits.
FOCUSES = (0.0, 1.0, 2.0)
FOCUSED: tuple[tuple[int, Bits], ...] = ((2**20, 32), (262_144, 1), (131_072, 1), (65_536, 1), (65_536, 8))

Ways = Iterator[tuple[str, int, int, Tensor]]


@dataclass
class Arguments:
    """An index at several sizes, and methods of projected gradients."""

    checkpoint_dir: Path = ROOT / "runs" / "demo" / "checkpoints"
    leaderboard_dir: Path = ROOT / "runs" / "leaderboard"
    cache_dir: Path = ROOT / "cache"
    """Of the leaderboard's pre-trained model."""
    parts: tuple[str, ...] = ("recall", "lds", "focus", "latency")
    rerank: int = 50
    masks: int = 100
    sizes: tuple[tuple[int, int], ...] = ((1_000_000, 8192), (1_000_000, 65_536))
    """Examples and numbers of the indexes whose latency is measured."""
    batch: int = 64
    repeats: int = 3


def ways(study: Study, queries: Any) -> Ways:
    """The name of each way, its size, its bytes an example and its scores [queries, train]."""
    for numbers, bits in SKETCHES:
        yield f"sketch, {bits} bit", numbers, *sketched(study, queries, wf.Sketch(numbers=numbers, bits=bits))
    for kind in (wf.LoGra, wf.TrackStar, wf.Trak):
        for rank in RANKS:
            numbers = sum(math.prod(min(rank, side) for side in layer.shape) for layer in study.layers.values())
            yield kind.name, rank, 4 * numbers, study.score(queries, kind(rank=rank)).values


def focused(study: Study, queries: Any) -> Ways:
    """The same of sketches by their focus."""
    for focus in FOCUSES:
        for numbers, bits in FOCUSED:
            sketch = wf.Sketch(numbers=numbers, bits=bits, focus=focus)
            yield f"focus {focus:g}, {bits} bit", numbers, *sketched(study, queries, sketch)


def sketched(study: Study, queries: Any, sketch: Sketch) -> tuple[int, Tensor]:
    """An index's bytes an example and its scores."""
    index = study.index(wf.EKFAC(factors=study.fit()), sketch)
    found = index.query(queries, k=len(study.train))
    return index.bytes_per_example, torch.zeros_like(found.values).scatter_(1, found.train, found.values)


def recall(arguments: Arguments) -> dict[str, object]:
    """The part of each query's exact top ten that is found, on the example's model."""
    from models import load_example  # noqa: PLC0415  (from the example's folder)

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        study, queries = load_example(arguments.checkpoint_dir, Path(folder, "run"))
        exact = study.score(queries).values
        for name, size, taken, scores in ways(study, queries):
            candidates = scores.topk(arguments.rerank, dim=1).indices
            again = torch.full_like(scores, -torch.inf).scatter_(1, candidates, exact.gather(1, candidates))
            found, reranked = (top_overlap(each, exact, 10) for each in (scores, again))
            rows.append({"name": name, "size": size, "bytes": taken, "found": found, "reranked": reranked})
            print(rows[-1], flush=True)
    return {"queries": len(queries), "train": len(study.train), "rerank": arguments.rerank, "rows": rows}


def lds(arguments: Arguments, compared: Callable[[Study, Any], Ways] = ways) -> dict[str, object]:
    """Linear datamodeling scores on the leaderboard's retrainings without a random part of the examples."""
    from leaderboard.retrainings import protocol_b  # noqa: PLC0415  (which loads the example's data)
    from leaderboard.setting import Setting, Size, record  # noqa: PLC0415
    from leaderboard.subject import Subject  # noqa: PLC0415

    setting, run_dir = Setting(Size(), arguments.cache_dir), arguments.leaderboard_dir
    truth, _ = protocol_b(setting, run_dir, arguments.masks, 0.01, 1)
    with tempfile.TemporaryDirectory() as folder:
        study = Subject(setting, record(setting, run_dir / "training"), Path(folder, "run")).study()
        scores, sizes = {"ekfac": study.score(setting.queries).values}, {}
        for name, size, taken, values in compared(study, setting.queries):
            scores[f"{name}, {size}"], sizes[f"{name}, {size}"] = values, (name, size, taken)
        report = evaluate_lds(scores, truth)
    rows = [
        {"name": name, "size": size, "bytes": taken, **report.means[called].to_json(),
         "from_ekfac": report.difference(called, "ekfac").to_json()}
        for called, (name, size, taken) in sizes.items()
    ]  # fmt: skip
    for row in rows:
        print(row, flush=True)
    return {"masks": arguments.masks, "queries": len(setting.queries), "train": len(setting.train),
            "ekfac": report.means["ekfac"].to_json(), "rows": rows}  # fmt: skip


def latency(arguments: Arguments) -> dict[str, object]:
    """Seconds for the ten highest and lowest of one query, and of each in a batch, in an index of random bits."""
    rows = []
    for examples, numbers in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            search, counters = random_index(Path(folder, "codes"), examples, Sketch(numbers=numbers))
            for queries in (1, arguments.batch):
                these, norms, wall, cpu = counters[:queries], torch.ones(queries), [], []
                search.best(these, norms, 10)  # reads it into the system's cache
                for _ in range(arguments.repeats):
                    start, used = time.perf_counter(), time.process_time()
                    search.best(these, norms, 10)
                    wall.append((time.perf_counter() - start) / queries)
                    cpu.append((time.process_time() - used) / queries)
                rows.append(
                    {"examples": examples, "bytes": search.sketch.code_bytes, "queries": queries,
                     "seconds": median(wall), "fastest": min(wall), "cpu_seconds": median(cpu)}
                )  # fmt: skip
                print(rows[-1], flush=True)
    return {"threads": torch.get_num_threads(), "rows": rows}


def random_index(file: Path, examples: int, sketch: Sketch) -> tuple[Search, Tensor]:
    """A search through a memory-mapped file of random bits, and counters of queries."""
    generator, together = torch.Generator().manual_seed(0), 2**14
    with file.open("wb") as stream:
        for start in range(0, examples, together):
            shape = (min(together, examples - start), sketch.code_bytes)
            torch.randint(256, shape, generator=generator, dtype=torch.uint8).numpy().tofile(stream)
    size = examples * sketch.code_bytes
    codes = torch.from_file(str(file), size=size, dtype=torch.uint8).view(examples, -1)
    ones = torch.ones(examples)
    tensors = {"codes": codes, "scales": ones, "norms": ones}
    shards = [
        Shard({name: each[start : start + together] for name, each in tensors.items()},
              torch.arange(start, min(start + together, examples)), None)
        for start in range(0, examples, together)
    ]  # fmt: skip
    return Search(sketch, shards, torch.device("cpu")), torch.randn(64, sketch.numbers, generator=generator)


def frontier(found: dict[str, Any]) -> Figure:
    """Of each way, what it finds and what its scores predict, against bytes an example."""
    figure = Figure(figsize=(11, 4.2), dpi=RESOLUTION, layout="constrained")
    FigureCanvasAgg(figure)
    recalled = [*found["recall"]["rows"], *found["earlier"]["rows"]]
    panels = (
        ("Of the exact top ten, found", recalled, "found"),
        ("... after the 50 best are scored again", recalled, "reranked"),
        ("Linear datamodeling score", found["lds"]["rows"], "value"),
    )
    colours = dict(zip(dict.fromkeys(each["name"] for each in recalled),
                       (BLUE, "#56B4E9", ORANGE, *SPARE_COLOURS[1:], GREY, "#E69F00"), strict=False))  # fmt: skip
    for axes, (title, rows, key) in zip(figure.subplots(1, 3), panels, strict=True):
        for name, colour in colours.items():
            points = sorted((each["bytes"], each[key]) for each in rows if each["name"] == name)
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name, markersize=4) if points else None
        axes.set_xscale("log")
        axes.set_title(title, loc="left", fontsize=10)
        axes.set(xlabel="Bytes an example", ylim=(0, 1.02 if key != "value" else 0.6))
        axes.spines[["top", "right"]].set_visible(False)
        if key == "value":
            own = found["lds"]["ekfac"]["value"]
            axes.axhline(own, color=INK, linewidth=1, dashes=(2, 2))
            axes.annotate("EK-FAC itself", (1, own), (-4, 3), xycoords=("axes fraction", "data"),
                          textcoords="offset points", ha="right", color=INK, fontsize=8)  # fmt: skip
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def main(arguments: Arguments) -> None:
    """The parts that are asked for; others stay as they are."""
    file = RESULTS / "index.json"
    found = {name: each for name, each in json.loads(file.read_text()).items() if name not in provenance()}
    parts: dict[str, Callable[[Arguments], dict[str, object]]]
    parts = {"recall": recall, "lds": lds, "focus": partial(lds, compared=focused), "latency": latency}
    for part in arguments.parts:
        found[part] = {**provenance(), **parts[part](arguments)}
        save_results("index", found)
    frontier(found).savefig(ROOT / "docs" / "images" / "index.png")


if __name__ == "__main__":
    main(tyro.cli(Arguments, use_underscores=True))
