"""One family: which layers are tracked, and whether their gradients are those of autograd, one example at a time.

The truth is of another model of the same numbers, of which nothing is used but the task's loss.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

import wherefrom as wf
from wherefrom.engine.capture import Captured
from wherefrom.engine.example_gradients import weight_gradients
from wherefrom.engine.loading import Examples
from wherefrom.engine.modules.coverage import untracked
from wherefrom.engine.modules.layer_types import trackable
from wherefrom.engine.modules.layers import TrackedLayer, select_layers
from wherefrom.engine.sweep import Collector, Sweep
from wherefrom.runtime.errors import WherefromError
from zoo.family import Family

BATCH_SIZES = 3, 4

Task = wf.Task[Any]
Layers = Mapping[str, TrackedLayer]
# Of every parameter by name, each example's gradient [examples, ...].
Gradients = Mapping[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What is known of a family.

    Attributes:
        refused: why they cannot be in batches of several examples; None where they can.
        alone: the error of their gradients in batches of one, where those of several are refused and these are not.
        when_named: kinds of modules that are tracked only when they are named, besides embeddings and output head.
        never: kinds that cannot be, or are refused in the pass of a batch.
        idle: patterns of layers that never run as modules: models use their weights by functions, or not at all.
        error: the largest difference of an example's gradient from autograd's, over examples, batch sizes and layers,
            named or not; relative to the layer's largest number. None where all of these sizes are refused.
    """

    model: str
    task: str
    refused: str | None
    alone: float | None
    when_named: tuple[str, ...]
    never: tuple[str, ...]
    idle: tuple[str, ...]
    error: float | None


def outcome(family: Family) -> Outcome:
    """What comes of the tiny model, but for scores."""
    model, task, examples = family.model(), family.task(), family.examples()
    truth = true_gradients(family)
    layers, idle = running(model, task, examples)
    named = [name for name, _ in model.named_modules() if pattern(name) not in idle]
    left = left_out(model, task, layers) & {model.get_submodule(name) for name in named}
    errors, refused = gradient_errors(model, task, layers, examples, truth)
    never, alone = {each for each in left if not trackable(each)}, list[float]()
    if refused:
        alone, _ = gradient_errors(model, task, layers, examples, truth, (1,))
    else:
        more, refusing = with_named(model, task, layers, named, examples, truth)
        errors += more
        never |= refusing & left
    return Outcome(
        model=type(model).__name__,
        task=type(task).__name__,
        refused=refused,
        alone=max(alone, default=None),
        when_named=kinds(left - never),
        never=kinds(never),
        idle=idle,
        error=max(errors, default=None),
    )


def with_named(
    model: nn.Module,
    task: Task,
    layers: Layers,
    names: Sequence[str],
    examples: Sequence[object],
    truth: Gradients,
) -> tuple[list[float], set[nn.Module]]:
    """Track what else of these names can be tracked: the errors of gradients, and the modules that were refused."""
    tracked = {use.name for layer in layers.values() for use in layer.uses}
    modules = {name: model.get_submodule(name) for name in names if name not in tracked}
    more = {name: each for name, each in modules.items() if trackable(each)}
    errors, refusing = list[float](), set[nn.Module]()
    while more:
        try:
            found = select_layers(model, [*layers, *more], task.head(model))
            found_errors, refused = gradient_errors(model, task, found, examples, truth)
            errors += found_errors
        except WherefromError as error:
            refused = str(error)
        if not refused:
            break
        said = {word.strip(".") for word in re.findall(r"[\w.]+", refused)}
        weights = {id(more[name].weight) for name in said & more.keys()}
        assert weights, refused
        refusing |= {each for each in more.values() if id(each.weight) in weights}
        more = {name: each for name, each in more.items() if each not in refusing}
    return errors, refusing


def kinds(modules: Iterable[nn.Module]) -> tuple[str, ...]:
    """Names of classes, each once, in order."""
    return tuple(sorted({type(each).__name__ for each in modules}))


def running(model: nn.Module, task: Task, examples: Sequence[object]) -> tuple[Layers, tuple[str, ...]]:
    """The layers that are tracked without being named, and patterns of those that would be, and do not run."""
    layers = select_layers(model, task.layers, task.head(model))
    found = Sweep(model, task, layers, wf.Execution(progress=False)).running(Examples(examples, task))
    return found, tuple(sorted({pattern(name) for name in layers.keys() - found.keys()}))


def pattern(name: str) -> str:
    """A layer's name without the numbers of blocks."""
    return re.sub(r"\b\d+\b", "*", name)


def besides(model: nn.Module, task: Task) -> set[nn.Module]:
    """Embeddings and the output head, which are left out on purpose."""
    head = task.head(model)
    return {each for each in model.modules() if isinstance(each, nn.Embedding) or each is head}


def left_out(model: nn.Module, task: Task, layers: Layers) -> set[nn.Module]:
    """The modules with weights that are not tracked, besides embeddings and the output head."""
    return {model.get_submodule(each.name) for each in untracked(model, layers)} - besides(model, task)


def tracked(family: Family, idle: Sequence[str]) -> tuple[int, float]:
    """In the usual size: how many layers are tracked without being named, and which share of weights that is.

    Embeddings and the output head do not count.

    Args:
        idle: patterns of layers that do not run.
    """
    model, task = family.without_numbers(), family.task()
    selected, aside = select_layers(model, task.layers, task.head(model)), besides(model, task)
    layers = {name: each for name, each in selected.items() if pattern(name) not in idle}
    beside = {id(each) for module in aside for each in module.parameters()}
    total = sum(each.numel() for each in model.parameters() if id(each) not in beside)
    left = [each for each in untracked(model, layers) if model.get_submodule(each.name) not in aside]
    return len(layers), 1 - sum(each.weights for each in left) / total


def true_gradients(family: Family) -> Gradients:
    """By autograd on the weights, one example at a time."""
    model, task = family.model().requires_grad_(), family.task()
    for module in model.modules():
        if is_parametrized(module, "weight"):
            remove_parametrizations(module, "weight")
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = []
    for example in family.examples():
        loss = task.train_loss(model, task.collate([task.select(model, example)]))
        rows.append(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
    return {name: torch.stack(each) for name, each in zip(names, zip(*rows, strict=True), strict=True)}


class ExampleGradients(Collector):
    """Keeps the gradient of each example, as a matrix."""

    def __init__(self, layers: Layers, examples: int) -> None:
        self.sums = {name: torch.zeros(examples, *layer.shape, dtype=torch.float64) for name, layer in layers.items()}

    def collect(self, layer: str, captured: Captured, batch: slice) -> None:
        """Put those of a batch where they belong."""
        gradients, into = weight_gradients(captured).double(), self.sums[layer][batch]
        if captured.columns is None:
            into += gradients[..., : into.shape[2]]
        else:
            into.scatter_add_(2, captured.columns.unsqueeze(1).expand_as(gradients), gradients)


def gradient_errors(
    model: nn.Module,
    task: Task,
    layers: Layers,
    examples: Sequence[object],
    truth: Gradients,
    sizes: Sequence[int] = BATCH_SIZES,
) -> tuple[list[float], str | None]:
    """The largest relative difference for each batch size that is not refused, and why one is."""
    names = {id(each): name for name, each in model.named_parameters()}
    errors, refused = [], None
    for size in sizes:
        collector = ExampleGradients(layers, len(examples))
        try:
            Sweep(model, task, layers, wf.Execution(progress=False)).run(
                "gradients", Examples(examples, task), collector, batch_size=size
            )
        except WherefromError as error:
            refused = refused or str(error)
            continue
        errors.append(max(_error(layers[name], name, found, names, truth) for name, found in collector.sums.items()))
    return errors, refused


def _error(layer: TrackedLayer, name: str, found: Tensor, names: Mapping[int, str], truth: Gradients) -> float:
    """Of one layer, in units of its largest number; where it has no part in the loss, as it is."""
    expected = [part.of(truth[names.get(id(part.parameter), f"{name}.weight")], 1) for part in layer.parts]
    largest = max(float(each.abs().max()) for each in expected)
    pairs = zip(layer.from_matrices(found), expected, strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs) / (largest or 1.0)


def score_error(family: Family, method: wf.Method) -> float:
    """The largest difference between scores of two batch sizes, relative to the largest score."""
    model, task, examples, values = family.model(), family.task(), family.examples(), list[Tensor]()
    for size in BATCH_SIZES:
        with tempfile.TemporaryDirectory() as folder:
            execution = wf.Execution(train_batch_size=size, query_batch_size=size, progress=False)
            study = wf.Study(Path(folder), model, task, train=examples, execution=execution)
            values.append(study.score(examples[:3], method).values)
    return float((values[0] - values[1]).abs().max() / values[1].abs().max())
