"""What query gradients of low rank cost in accuracy: a trained model's scores at several ranks against whole gradients.

    make demo && python benchmarks/low_rank.py --checkpoint_dir runs/demo/checkpoints

Random weights would not do here: how fast singular values fall is a property of trained models. Written to
`results/low_rank.json`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor
from workload import ROOT, save_results

import wherefrom as wf
from wherefrom.evaluate.agreement import compare_scores
from wherefrom.planning.forms import BankForm

sys.path.append(str(ROOT / "examples" / "wikitext"))


@dataclass
class Arguments:
    """Ranks against whole gradients."""

    checkpoint_dir: Path = ROOT / "runs" / "demo" / "checkpoints"
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    damping: float = 1e-8
    """As in the example."""
    rescore: int = 50


def top_overlap(found: Tensor, expected: Tensor, count: int) -> float:
    """The part of each query's `count` highest scores that both have, on average."""
    pairs = zip(found.topk(count).indices.tolist(), expected.topk(count).indices.tolist(), strict=True)
    return sum(len({*one} & {*other}) for one, other in pairs) / (count * len(found))


def main(arguments: Arguments) -> None:
    """Fit once, score at every rank, compare."""
    from models import load_example  # noqa: PLC0415  (from the example's folder)

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        study, queries = load_example(arguments.checkpoint_dir, folder)
        method = wf.EKFAC(damping=arguments.damping, factors=study.fit())
        whole = study.score(queries, method).values
        form = BankForm(torch.float32, torch.device("cpu"))
        whole_bytes = form.bytes_per_query(study.layers)
        for rank in arguments.ranks:
            start = time.perf_counter()
            low = study.score(queries, replace(method, query_rank=rank))
            seconds = time.perf_counter() - start
            again = study.score(queries, replace(method, query_rank=rank, rescore=arguments.rescore))
            assert low.query_errors is not None
            agreement = compare_scores(whole, low.values)
            rows.append(
                {
                    "rank": rank,
                    "memory": replace(form, rank=rank).bytes_per_query(study.layers) / whole_bytes,
                    "norm_left_out": float(low.query_errors.mean()),
                    "spearman": agreement.spearman.mean.value,
                    "top_10": top_overlap(low.values, whole, 10),
                    "top_10_rescored": top_overlap(again.values, whole, 10),
                    "seconds": seconds,
                }
            )
            print(rows[-1])
    save_results(
        "low_rank", {"queries": len(queries), "train": len(study.train), "rescore": arguments.rescore, "ranks": rows}
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments, use_underscores=True))
