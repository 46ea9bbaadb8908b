"""Training examples as a review queue: those most likely wrong or harmful first.

This module knows a study; it must not know files, nor how a queue is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from wherefrom.engine.loading import DatasetLike, Examples, Loader, Subset
from wherefrom.methods.factored import EKFAC, Factored
from wherefrom.methods.index.sketches import Sketch
from wherefrom.report.notebook import Table, View
from wherefrom.runtime.errors import check_argument, require
from wherefrom.scoring.keep import Aggregated
from wherefrom.study import Study
from wherefrom.tasks.task import evaluating

if TYPE_CHECKING:
    import pandas

Signal = Literal["neighbours", "self_influence", "loss", "held_out"]

_NEIGHBOURS = 10
_SHOWN = 10  # in a notebook
# Cosines are off by about 1 / 128.
_SKETCH = Sketch(numbers=16_384, bits=8, focus=0.0)
# Whose sketches are in memory at once: 64 MiB in float32.
_TOGETHER = 1000


@dataclass(frozen=True)
class Audit:
    """What `audit` has found.

    Attributes:
        signals: by name, each [train] in float64; higher is more suspicious.
        order: the signal that examples are ranked by.
    """

    signals: Mapping[str, Tensor]
    order: Signal

    @property
    def ranking(self) -> Tensor:
        """Training positions [train], the most suspicious first; of equal ones, the earlier."""
        return self.signals[self.order].argsort(descending=True, stable=True)

    def _repr_html_(self) -> str:
        """The first of the queue, for a notebook."""
        ranking, names = self.ranking.tolist(), [name.replace("_", " ").capitalize() for name in self.signals]
        rows = [
            [str(rank), str(train), *(f"{float(each[train]):.4g}" for each in self.signals.values())]
            for rank, train in enumerate(ranking[:_SHOWN], start=1)
        ]
        return View(
            "Audit",
            [f"the {len(rows)} most suspicious of {len(ranking):,} training examples, by {self.order}"],
            tables=[Table(["Rank", "Train", *names], rows)],
            meaning="Higher is more suspicious. to_pandas() has all of them.",
        )._repr_html_()

    def to_pandas(self) -> pandas.DataFrame:
        """A table with a line for each training example, the most suspicious first: rank, train and the signals.

        Raises:
            InputError: pandas is not installed.
        """
        ranking = self.ranking
        columns = {name: values[ranking].tolist() for name, values in self.signals.items()}
        ranks = range(1, len(ranking) + 1)
        frame: pandas.DataFrame = require("pandas").DataFrame({"rank": ranks, "train": ranking.tolist(), **columns})
        return frame


def audit(
    study: Study[Any],
    held_out: DatasetLike | None = None,
    method: Factored | None = None,
    order: Signal | None = None,
) -> Audit:
    """Rank the training examples of a study by how likely each is wrong or harmful.

    Signals, of which higher is more suspicious:

    - `neighbours`: minus the mean cosine of an example's whitened gradient with the ten of other examples whose cosines
      are largest in size, between -1 and 1. An example whose label is wrong is pulled the other way by those that are
      like it. Cosines are those of sketches, off by about 0.01;
    - `self_influence`: g_t^T (H + damping)^-1 g_t, high for what could only be learnt by heart;
    - `loss`: of the example, by the token where it has tokens;
    - `held_out`: minus the summed scores of the held-out queries: what raises their loss.

    Args:
        held_out: queries that are known to be right.
        method: whose curvature whitens gradients; `EKFAC()` unless given.
        order: the signal that examples are ranked by; by default `loss` of texts, whose wrong ones are like each other,
            and else `neighbours`.

    Raises:
        InputError: an argument is impossible.
        WherefromError: see `wherefrom.runtime.errors`; what was finished before stays valid.
    """
    order = order or ("loss" if study._sweep.task.by_token else "neighbours")
    check_argument(order in get_args(Signal), "order", order, f"one of {', '.join(get_args(Signal))}")
    check_argument(order != "held_out" or held_out is not None, "order", order, "another order, or held-out queries")
    check_argument(len(study.train) > 1, "train", f"{len(study.train)} example", "two or more, to be compared")
    method = method or EKFAC()
    signals = {
        "neighbours": _disagreement(study, method),
        "self_influence": study.self_influence(method).double(),
        "loss": _losses(study),
    }
    if held_out is not None:
        scores = study.score(held_out, method, keep=Aggregated("sum"))
        signals["held_out"] = -scores.values[0].to("cpu", torch.float64)
    return Audit(signals, order)


def _disagreement(study: Study[Any], method: Factored) -> Tensor:
    """Minus the mean cosine with the nearest other examples, [train]."""
    index, count = study.index(method, _SKETCH), len(study.train)
    k, found = min(_NEIGHBOURS + 1, count), []  # one more: an example is its own nearest
    for start in range(0, count, _TOGETHER):
        positions = range(start, min(start + _TOGETHER, count))
        best = index.query(Subset(study.train, positions), k, normalized=True)
        # Of few examples, one can be both among the highest and the lowest; each counts once, at its position.
        cosines = torch.zeros(len(positions), count, dtype=torch.float64)  # [some, train]
        for train, values in ((best.train, best.values), (best.lowest_train, best.lowest_values)):
            cosines.scatter_(1, train.cpu(), values.to("cpu", torch.float64))
        cosines[torch.arange(len(positions)), torch.tensor(positions)] = 0  # itself
        nearest = cosines.abs().topk(min(_NEIGHBOURS, count - 1), dim=1).indices
        found.append(-cosines.gather(1, nearest).mean(1))
    return torch.cat(found)


def _losses(study: Study[Any]) -> Tensor:
    """The training loss of each example, by the token where there are some, [train]."""
    model, task = study.model, study._sweep.task
    examples, found = Examples(study.train, task), []
    with torch.no_grad(), evaluating(model), Loader(examples, study._sweep.device, model=model) as loader:
        for position in range(len(examples)):
            one = range(position, position + 1)
            batch = loader.load(one).batch
            loss = examples.summed_loss(model, batch, one).detach()
            found.append(loss.double().cpu() / max(1, task.counted(model, batch)))
    return torch.stack(found)
