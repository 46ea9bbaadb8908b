"""What an index of compressed gradients takes, how fast it answers, and how often it names the right examples.

    make demo && python benchmarks/index.py --checkpoint_dir runs/demo/checkpoints

Recall is that of a trained model on its own text. Latency is that of rows of random numbers, in the system's cache, for
one query whose gradient is there. Times are of the processor, so that other work counts for little: run it with
OMP_NUM_THREADS=1. Written to `results/index.json`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
import tyro
from low_rank import top_overlap
from torch import Tensor
from workload import ROOT, save_results

import wherefrom as wf
from wherefrom.methods.projected.gradient_store import shard_name
from wherefrom.methods.projected.projections import Directions, Quantization, packed
from wherefrom.store.fingerprint import Dataset

sys.path.append(str(ROOT / "examples" / "wikitext"))

TYPES: tuple[Quantization, ...] = ("float32", "bfloat16", "int8")


@dataclass
class Arguments:
    """An index at several sizes against exact scores."""

    checkpoint_dir: Path = ROOT / "runs" / "demo" / "checkpoints"
    ranks: tuple[int, ...] = (4, 8, 16, 32, 64)
    rerank: int = 50
    rows: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Training examples for the latency."""
    latency_rank: int = 8
    repeats: int = 5


Study = wf.Study[dict[str, Tensor]]


def recalls(study: Study, queries: Dataset[object], arguments: Arguments) -> list[dict[str, object]]:
    """The part of each query's exact top ten that an index finds, by rank, directions and type."""
    exact = study.score(queries).values
    cases: list[tuple[Directions, int, Quantization]] = [
        *(("eigenvectors", rank, "bfloat16") for rank in arguments.ranks),
        *(("random", rank, "bfloat16") for rank in arguments.ranks if rank <= 32),  # a dense matrix of rank^4
        *(("eigenvectors", 16, each) for each in TYPES if each != "bfloat16"),
    ]
    found: list[dict[str, object]] = []
    tokens = sum(len(example["input_ids"]) for example in study.train)  # type: ignore[misc, attr-defined]
    for directions, rank, quantization in cases:
        compression = wf.Compression(directions=directions, rank=rank, quantization=quantization)
        start = time.process_time()
        index = study.index(compression=compression)
        built = time.process_time() - start
        plain = index.query(queries, k=len(study.train))
        scores = torch.zeros_like(plain.values).scatter_(1, plain.train, plain.values)
        candidates = plain.train[:, : arguments.rerank]
        again = torch.full_like(scores, -torch.inf).scatter_(1, candidates, exact.gather(1, candidates))
        found.append(
            {
                "directions": directions,
                "rank": rank,
                "quantization": quantization,
                "bytes_per_example": index.bytes_per_example,
                "tokens_per_cpu_second": tokens / built,
                "recall_10": top_overlap(scores, exact, 10),
                "recall_10_reranked": top_overlap(again, exact, 10),
            }
        )
        print(found[-1], flush=True)
    return found


def latencies(study: Study, arguments: Arguments, folder: Path) -> list[dict[str, object]]:
    """Seconds of the processor for the top ten of one query among rows of random numbers, by their count and type."""
    found: list[dict[str, object]] = []
    for quantization in TYPES:
        real = study.index(compression=wf.Compression(rank=arguments.latency_rank, quantization=quantization))
        generator = torch.Generator().manual_seed(0)
        for count in arguments.rows:
            cache = replace(real.gradients.cache, folder=folder / f"{quantization}-{count}")
            examples = replace(real.gradients.examples, dataset=range(count))
            stored = replace(real.gradients, examples=examples, cache=cache)
            for shard in stored.shards:
                gradients = torch.randn(len(shard), stored.size, generator=generator)
                cache.artifact(shard_name(shard)).save(packed(gradients, quantization, stored.parts))
            index = replace(real, gradients=stored)
            query, seconds = torch.randn(1, stored.size, generator=generator), []
            index.highest(query, 10)  # opens the index, and reads it once
            for _ in range(arguments.repeats):
                start = time.process_time()
                index.highest(query, 10)
                seconds.append(time.process_time() - start)
            found.append(
                {
                    "quantization": quantization,
                    "rows": count,
                    "bytes_per_example": index.bytes_per_example,
                    "cpu_seconds": median(seconds),
                }
            )
            print(found[-1], flush=True)
            cache.clear()
    return found


def main(arguments: Arguments) -> None:
    """Recall on the example's model, then latency."""
    from models import load_example  # noqa: PLC0415  (from the example's folder)

    model, _, train, queries = load_example(arguments.checkpoint_dir)
    with tempfile.TemporaryDirectory() as folder:
        study: Study = wf.Study(Path(folder, "run"), model, wf.CausalLM(), train=train)
        measured = {
            "queries": len(queries),
            "train": len(train),
            "rerank": arguments.rerank,
            "recall": recalls(study, queries, arguments),
            "latency_rank": arguments.latency_rank,
            "latency": latencies(study, arguments, Path(folder)),
        }
    save_results("index", measured)


if __name__ == "__main__":
    main(tyro.cli(Arguments, use_underscores=True))
