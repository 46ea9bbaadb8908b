"""How much of a model is tracked, and what is to be said of the rest."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

from torch import nn

from wherefrom.engine.modules.layers import TrackedLayer, parameters_of, weights_of
from wherefrom.tasks.adapters.composition import adapters_of


class Untracked(NamedTuple):
    """Weights that are left out: the module that owns them, its kind, and how many there are."""

    name: str
    kind: str
    weights: int


def untracked(model: nn.Module, layers: Mapping[str, TrackedLayer]) -> list[Untracked]:
    """The modules whose own weights are trainable and not tracked, in the model's order; tied weights count once.

    Of a model that is frozen as a whole every weight counts, or every one of its adapters.
    """
    parameters, parts = list(parameters_of(model)), Counter[tuple[int, str]]()
    uses = [use for layer in layers.values() for use in layer.uses]
    for part in (part for use in uses for part in use.parts):
        parts[id(part.owner), part.name] += part.numel
    tracked = {use.module for use in uses}
    seen = {each.identity for each in parameters if each.module in tracked}
    frozen, adapters = not any(each.value.requires_grad for each in parameters), adapters_of(model)
    counts: Counter[tuple[str, str]] = Counter()
    for each in parameters:
        trained = each.value.requires_grad or (frozen and (adapters is None or each.module in adapters.modules))
        if each.identity not in seen and trained:
            counts[each.owner, type(each.module).__name__] += each.value.numel() - parts[id(each.module), each.name]
        seen.add(each.identity)
    return [Untracked(name, kind, weights) for (name, kind), weights in counts.items() if weights]


def coverage(model: nn.Module, layers: Mapping[str, TrackedLayer]) -> str:
    """How much of a model is tracked, on one line."""
    tracked, left = sum(math.prod(layer.shape) for layer in layers.values()), untracked(model, layers)
    total = tracked + sum(each.weights for each in left)
    kinds: dict[str, list[Untracked]] = {}
    for each in left:
        kinds.setdefault(each.kind, []).append(each)
    parts = [f"{same[0].name if len(same) == 1 else len(same)} {kind} ({_count(same)})" for kind, same in kinds.items()]
    rest = f"; not tracked: {', '.join(parts)}" if parts else ""
    return f"Tracking {len(layers)} layer(s), {_short(tracked)} of {_short(total)} weights{rest}"


def mostly_left_out(
    model: nn.Module, layers: Mapping[str, TrackedLayer], head: nn.Module | None, idle: Set[str] = frozenset()
) -> str | None:
    """What is to be said where less than half of the trained weights are tracked; None otherwise.

    Embeddings and the output head do not count, which are left out on purpose. Beside adapters everything does that was
    trained, however little.

    Args:
        idle: layers that never run.
    """
    whole = adapters_of(model) is None
    aside = {
        name for name, module in model.named_modules() if whole and (isinstance(module, nn.Embedding) or module is head)
    }
    left = [each for each in untracked(model, layers) if each.name not in aside]
    own = [layer for layer in layers.values() if not any(use.name in aside for use in layer.uses)]
    tracked, missing = sum(math.prod(layer.shape) for layer in own), sum(each.weights for each in left)
    if not missing or (whole and tracked >= missing):
        return None
    owners_left = {id(model.get_submodule(each.name)): each for each in left}
    inside: dict[Untracked, list[str]] = {each: [] for each in left}
    for use in (use for uses in weights_of(model) for use in uses if id(use.parts[0].owner) in owners_left):
        inside[owners_left[id(use.parts[0].owner)]].append(use.name)
    possible = [each for each in left if inside[each] and idle.isdisjoint(inside[each])]
    impossible = [each for each in left if not inside[each]]
    advice = []
    if possible:
        names = _patterns([name for each in possible for name in inside[each]])
        advice.append(f"{_count(possible)} could be, with {names} among the `layers`")
    if impossible:
        kinds = ", ".join(sorted({each.kind for each in impossible}))
        advice.append(f"{_count(impossible)} cannot be, which are of no supported kind of layer ({kinds})")
    if len(possible) + len(impossible) < len(left):
        advice.append("others never run")
    share = tracked / (tracked + missing)
    besides = ", besides embeddings and output head, are" if whole else " are"
    return (
        f"Only {share:.0%} of the {_short(tracked + missing)} weights that were trained{besides} tracked: scores say "
        f"nothing of what the others have learned. Of these, {'; '.join(advice)}"
    )


def never_run(model: nn.Module, chosen: Mapping[str, TrackedLayer], idle: Set[str]) -> str | None:
    """What is to be said of layers that would have been tracked, and do not run; None where all do."""
    if not idle:
        return None
    sizes = {name: math.prod(layer.shape) for name, layer in chosen.items()}
    total = sum(sizes.values()) + sum(each.weights for each in untracked(model, chosen))
    return (
        f"{len(idle)} layer(s) never run in a forward pass, and are not tracked: {_patterns(sorted(idle))}. They have "
        f"{sum(sizes[name] for name in idle) / total:.1%} of the weights, which are used by functions, or not at all"
    )


def _patterns(names: Sequence[str]) -> str:
    """Names without the numbers of blocks, for messages."""
    found = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names))
    return ", ".join(map(repr, found[:8])) + (", ..." if len(found) > 8 else "")


def _count(modules: Sequence[Untracked]) -> str:
    return _short(sum(each.weights for each in modules))


def _short(count: int) -> str:
    """A count with a unit: 85.1M."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
