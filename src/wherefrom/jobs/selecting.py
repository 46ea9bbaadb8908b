"""The training examples that help a target set most, without copies of one another, and shared out among groups.

This module knows a study; it must not know files, nor how a selection is shown.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from wherefrom.engine.loading import DatasetLike, Subset, indexed
from wherefrom.methods.factored import EKFAC
from wherefrom.methods.method import Method
from wherefrom.report.attribution import LONG, runs
from wherefrom.runtime.errors import InputError, check_argument, require
from wherefrom.scoring.keep import Aggregated, Keep, Pairs
from wherefrom.store.fingerprint import Dataset, dataset_digest, read_example
from wherefrom.study import Study

if TYPE_CHECKING:
    import pandas

Normalized = Literal["none", "targets", "examples"]

logger = logging.getLogger("wherefrom")


@dataclass(frozen=True)
class Selection:
    """What `select` has chosen.

    Attributes:
        chosen: training positions [n], the best first; of equal ones, the earlier.
        values: what each training example is worth to the targets, [train] in float64.
        copies: positions that were passed over, in ascending order: they say what better ones say.
        groups: what each training example belongs to, [train]; None where nothing is shared out.
    """

    chosen: Tensor
    values: Tensor
    copies: Sequence[int]
    groups: Sequence[str] | None = None

    def to_pandas(self) -> pandas.DataFrame:
        """A table with a line for each example that was chosen, the best first: rank, train, value and the group.

        Raises:
            InputError: pandas is not installed.
        """
        chosen = self.chosen.tolist()
        columns = {"rank": range(1, len(chosen) + 1), "train": chosen, "value": self.values[self.chosen].tolist()}
        groups = {} if self.groups is None else {"group": [self.groups[each] for each in chosen]}
        frame: pandas.DataFrame = require("pandas").DataFrame({**columns, **groups})
        return frame


def select(
    study: Study[Any],
    targets: DatasetLike,
    n: int,
    method: Method | None = None,
    *,
    normalized: Normalized = "none",
    balance: Sequence[object] | None = None,
    overlap: float = 0.5,
) -> Selection:
    """Choose the training examples that help a target set most: those of the highest scores, summed over the targets.

    An example is passed over as a copy where half of its runs of five words, or of five tokens if it has no `text`,
    stand in better ones that were chosen already; of others, only the very same.

    Args:
        targets: queries, as many as there are of what the model is to do well.
        n: how many are chosen.
        method: whose scores; `EKFAC()` unless given.
        normalized: "none" sums scores as they are, so that a target or an example of a large gradient counts more.
            "targets" divides each target's scores by their root mean square first. "examples" divides each example's
            sum by the root of its self-influence, which is the cosine with the targets' summed gradient but for a
            factor (l-RelatIF of Barshan et al. 2020); the method has to have self-influence.
        balance: what each training example belongs to, in dataset order, such as a column: then each group has an equal
            share, and what one cannot fill, the others do.
        overlap: how large a part makes a copy: 1 passes over those alone that say nothing new.

    Raises:
        InputError: an argument is impossible, or too few examples are no copies of others.
        WherefromError: see `wherefrom.runtime.errors`; what was finished before stays valid.
    """
    count, targets = len(study.train), indexed("targets", targets)
    check_argument(1 <= n <= count, "n", n, f"1 to {count}, which is all training examples")
    check_argument(
        normalized in get_args(Normalized), "normalized", normalized, f"one of {', '.join(get_args(Normalized))}"
    )
    check_argument(0 < overlap <= 1, "overlap", overlap, "a part above 0 and up to 1")
    groups = None if balance is None else [str(each) for each in balance]
    if groups is not None and len(groups) != count:
        raise InputError(f"balance: {len(groups)} groups of {count} training examples: expected one of each.")
    values = _values(study, targets, method or EKFAC(), normalized)
    ranking = values.argsort(descending=True, stable=True).tolist()
    chosen, copies = _chosen(ranking, n, groups, _Said(study.train, overlap))
    if len(chosen) < n:
        raise InputError(
            f"n={n}: {len(chosen)} training examples are no copies of others. Choose that many, or give a larger "
            f"overlap than {overlap}."
        )
    if copies:
        logger.info(f"{len(copies):,} training examples are passed over as copies of better ones.")
    return Selection(torch.tensor(chosen), values, sorted(copies), groups)


def _values(study: Study[Any], targets: DatasetLike, method: Method, normalized: Normalized) -> Tensor:
    """What each training example is worth to the targets, [train] in float64."""
    norms = torch.ones((), dtype=torch.float64)
    if normalized == "examples":  # first, since not every method has it
        norms = study.self_influence(method).to("cpu", torch.float64).sqrt()
    together = normalized != "targets" and Aggregated in method.keeps
    keep: Keep[Any] = Aggregated("sum") if together else Pairs()
    scores = study.score(targets, method, keep=keep)
    values = torch.zeros(len(study.train), dtype=torch.float64)
    for one in scores.values:  # a target at a time: they may lie on the disk
        each = one.to("cpu", torch.float64)  # [train]
        scale = each.square().mean().sqrt() if normalized == "targets" else each.new_ones(())
        values += torch.where(scale > 0, each / scale, 0.0)
    return torch.where(norms > 0, values / norms, 0.0)


class _Said:
    """What chosen examples say: an example that says nearly the same is a copy."""

    def __init__(self, train: Dataset[object], overlap: float) -> None:
        self._train, self._overlap, self._runs = train, overlap, set[Hashable]()

    def takes(self, position: int) -> bool:
        """Whether an example is no copy; then what it says is known from here on."""
        found = self._runs_of(position)
        if len(found & self._runs) >= self._overlap * len(found):
            return False
        self._runs |= found
        return True

    def _runs_of(self, position: int) -> set[Hashable]:
        example = read_example(self._train, position)
        columns = example if isinstance(example, Mapping) else {}
        text, tokens = columns.get("text"), columns.get("input_ids")
        if isinstance(text, str):
            return {*runs(text)} or {text}
        if tokens is None:
            return {dataset_digest(Subset(self._train, [position]))}
        ids = tuple(torch.as_tensor(tokens).flatten().tolist())
        return {ids[at : at + LONG] for at in range(max(1, len(ids) - LONG + 1))}


def _chosen(ranking: Sequence[int], n: int, groups: Sequence[str] | None, said: _Said) -> tuple[list[int], list[int]]:
    """Up to `n` positions, the best first, and the copies that were passed over."""
    waiting: dict[str, list[int]] = {}  # of each group, the best last
    for position in reversed(ranking):
        waiting.setdefault(groups[position] if groups else "", []).append(position)
    names, rank = list(waiting), {position: at for at, position in enumerate(ranking)}
    chosen, copies = list[int](), list[int]()
    while waiting and len(chosen) < n:  # a turn, in which each group has one
        for name in sorted(waiting, key=lambda each: rank[waiting[each][-1]]):
            while waiting[name] and len(chosen) < n:
                position = waiting[name].pop()
                if said.takes(position):
                    chosen.append(position)
                    break
                copies.append(position)
            if not waiting[name]:
                del waiting[name]
    if groups:
        counts = Counter(groups[each] for each in chosen)
        few = [f"{name} ({counts[name]})" for name in sorted(names) if counts[name] < n // len(names)]
        if few:
            logger.warning(f"Groups that cannot fill their share, {n // len(names)} of {n}: {', '.join(few)}.")
    return sorted(chosen, key=lambda each: rank[each]), copies
