"""Products with the Gauss-Newton matrix of a model's training loss, over the weights of tracked layers.

H = mean over examples of J^T (d^2 loss / d z^2) J (Schraudolph 2002; Martens 2020, section 8), where z is all that the
model returns, J the derivative of z by the weights, and the loss a function of z. For cross-entropy and half the
squared error it is the Fisher information, which the factors' eigenvalues are sampled from. Of many vectors at once:
J v in forward mode, where they share the pass itself; the loss's curvature by differentiating its gradient, which for
cross-entropy is p * (u - p.u); and J^T in one batched backward pass. What a task does not count has no part in the
loss, so it has none here. This module knows models, tasks and layers; it does not know what products are for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from wherefrom.curvature.operators import Operator
from wherefrom.engine.loading import Examples, Loader
from wherefrom.engine.modules.layers import TrackedLayer, owners
from wherefrom.engine.modules.written_out import through_maps
from wherefrom.engine.passes import frozen
from wherefrom.engine.sweep import Sweep
from wherefrom.runtime.errors import InputError, LayerError, LossError
from wherefrom.runtime.memory import out_of_memory
from wherefrom.runtime.signals import held_signals
from wherefrom.tasks.task import Batch

_ACTION = "Gauss-Newton products"


class WeightSpace:
    """The weights of tracked layers as one vector: their gradient matrices [out, in (+1)], one after the other.

    Raises:
        LayerError: a layer's weights cannot be part of it.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, TrackedLayer]) -> None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._layers = layers
        self.shapes = {name: layer.shape for name, layer in layers.items()}
        self._names = {name: _parameter_names(layer, names) for name, layer in layers.items()}
        self.owners = owners(layers)
        self.parameters = {name: model.get_parameter(name) for each in self._names.values() for name in each}

    @property
    def sizes(self) -> dict[str, int]:
        """How many weights each layer has."""
        return {name: outputs * inputs for name, (outputs, inputs) in self.shapes.items()}

    def split(self, vectors: Tensor) -> dict[str, Tensor]:
        """[queries, weights] as each layer's matrices, [queries, out, in (+1)]: views."""
        parts = vectors.split(list(self.sizes.values()), 1)
        return {name: part.unflatten(1, shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def join(self, matrices: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `split`; matrices may have more columns, such as those for alignment."""
        return torch.cat([matrices[name][..., : shape[1]].flatten(1) for name, shape in self.shapes.items()], 1)

    def to_parameters(self, vectors: Tensor) -> dict[str, Tensor]:
        """[queries, weights] as the model's parameters have them, [queries, *shape]."""
        found: dict[str, Tensor] = {}
        for name, matrices in self.split(vectors).items():
            layer = self._layers[name]
            for parameter, part, numbers in zip(
                self._names[name], layer.parts, layer.from_matrices(matrices), strict=True
            ):
                if part.index == slice(None):
                    found[parameter] = numbers
                    continue
                if parameter not in found:  # what is not tracked of it does not move
                    found[parameter] = numbers.new_zeros(len(numbers), *part.parameter.shape)
                part.of(found[parameter], 1).copy_(numbers)
        return found

    def from_parameters(self, values: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `to_parameters`."""
        matrices = []
        for name, layer in self._layers.items():
            parts = [part.of(values[each], 1) for part, each in zip(layer.parts, self._names[name], strict=True)]
            matrices.append(layer.to_matrices(*parts).flatten(1))
        return torch.cat(matrices, 1)


def _parameter_names(layer: TrackedLayer, names: Mapping[int, str]) -> list[str]:
    """The names in the model of a layer's weight and bias."""
    padding = getattr(layer.main.module, "padding_idx", None) if layer.one_hot else None
    if padding is not None:
        raise LayerError(
            f"Layer {layer.name!r} is an embedding with padding_idx={padding}, which learns nothing there and moves "
            "outputs all the same, so solvers cannot follow it. Leave it out with `layers=[...]`, or score without a "
            "solver."
        )
    found = [names[id(part.parameter)] for part in layer.parts if id(part.parameter) in names]
    if len(found) < len(layer.parts):
        raise LayerError(
            f"Layer {layer.name!r}: its weight is computed from other parameters, which solvers cannot follow. "
            "Leave it out with `layers=[...]`, or score without a solver."
        )
    return found


class _ModelCall(NamedTuple):
    """One call of the model: what it was given, and what it returned.

    Attributes:
        outputs: the tensors of real numbers in what it returned that depend on the weights, with the graph that leads
            there.
        leaves: the same numbers, which the loss was computed from.
        indices: which of all its tensors of real numbers they are.
    """

    arguments: tuple[object, ...]
    keywords: dict[str, object]
    outputs: list[Tensor]
    leaves: list[Tensor]
    indices: list[int]


def batch_product(
    loss: Callable[[], Tensor],
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    tangents: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The sum over a batch's examples of J^T (d^2 loss / d z^2) J v, for each of some vectors v.

    Args:
        loss: computes the batch's summed loss by calling the model.
        model: frozen but for `parameters`.
        parameters: those that vectors have numbers for, by their names in the model.
        tangents: the vectors, [queries, *shape] for each parameter, as the result has them.

    Raises:
        LossError: the loss is not a function, with a curvature, of what the model returns.
    """
    with _cut(model) as calls, torch.enable_grad():
        value = loss()
    leaves = [leaf for call in calls for leaf in call.leaves]
    slopes = _slopes(value, leaves, list(parameters.values()))
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    moved = [each for call in calls for each in _pushed(model, call, weights, tangents)]
    seen = [(slope, u) for slope, u in zip(slopes, moved, strict=True) if slope is not None and slope.requires_grad]
    if not seen:
        raise LossError(
            "The task's loss has no curvature in what the model returns, so there is no Gauss-Newton matrix. Let "
            "train_loss compute the loss from the model's logits or predictions, rather than take a loss that the "
            "model has computed itself."
        )
    curved = _pulled([slope for slope, _ in seen], leaves, [u for _, u in seen])
    outputs = [output for call in calls for output in call.outputs]
    found = _pulled(outputs, list(parameters.values()), curved)
    return dict(zip(parameters, found, strict=True))


@contextmanager
def _cut(model: nn.Module) -> Iterator[list[_ModelCall]]:
    """Note the model's calls, and cut the graph between what it returns and what is made of that."""
    calls: list[_ModelCall] = []

    def hook(_: nn.Module, arguments: tuple[object, ...], keywords: dict[str, object], output: object) -> object:
        if any(each.requires_grad for each in _real(tree_leaves((arguments, keywords)))):
            raise LossError("The task calls the model on what the model has returned, which solvers cannot follow.")
        real = _real(tree_leaves(output))
        indices = [index for index, each in enumerate(real) if each.requires_grad]
        call = _ModelCall(arguments, keywords, [real[index] for index in indices], [], indices)

        def leaf(each: object) -> object:
            if not (isinstance(each, Tensor) and each.requires_grad):
                return each
            call.leaves.append(each.detach().requires_grad_())
            return call.leaves[-1]

        calls.append(call)
        return tree_map(leaf, output)

    handle = model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _real(leaves: Sequence[object]) -> list[Tensor]:
    return [each for each in leaves if isinstance(each, Tensor) and each.is_floating_point()]


def _slopes(value: Tensor, leaves: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The loss's gradient by what the model has returned, with its graph; None where the loss does not look."""
    if not leaves or not value.requires_grad:
        raise LossError(
            "The task's loss does not depend on what calling the model returns. Let train_loss call the model itself, "
            "model(...), and none of its parts or methods alone."
        )
    beside = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
    if any(each is not None for each in beside):
        raise LossError(
            "The task's loss depends on tracked weights in another way than through what the model returns, such as a "
            "penalty, of which the Gauss-Newton matrix knows nothing. Leave that out of train_loss."
        )
    return torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)


def _pushed(
    model: nn.Module, call: _ModelCall, weights: Mapping[str, Tensor], tangents: Mapping[str, Tensor]
) -> list[Tensor]:
    """J v of one call, [queries, *shape] for each of its outputs: in forward mode, the weights alone moving."""

    def outputs(moving: dict[str, Tensor]) -> list[Tensor]:
        real = _real(tree_leaves(functional_call(model, moving, call.arguments, call.keywords)))
        return [real[index] for index in call.indices]

    def one(tangent: dict[str, Tensor]) -> list[Tensor]:
        moved: list[Tensor] = jvp(outputs, (dict(weights),), (tangent,))[1]
        return moved

    with torch.no_grad():
        found: list[Tensor] = vmap(one)(dict(tangents))
    return found


def _pulled(values: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """J^T v of values by inputs, for each of some vectors [queries, *shape of a value]: [queries, *shape] by input."""

    def one(these: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(values, inputs, these, materialize_grads=True, allow_unused=True)

    # Not `is_grads_batched`, whose older vmap takes many operations' derivatives vector by vector.
    found: tuple[Tensor, ...] = vmap(one)(list(vectors))
    return found


class DampedGaussNewton(Generic[Batch]):
    """H + D over the training examples, and the filter that stands for its inverse: the `System` of a solver.

    Args:
        preconditioner: the filter; D is its damping of each layer, or damping x P^-1 where it is conditioned.
        damping: D of layers of which the filter has none.
        pairs: examples x vectors of one pass; when memory runs out, half of them from then on.

    Raises:
        InputError: there is no damping, or the model or the factors are not all on the model's device.
        LayerError: a layer cannot be followed.
    """

    def __init__(
        self,
        sweep: Sweep[Batch],
        preconditioner: Operator,
        train: Examples[Batch],
        damping: float | None,
        pairs: int,
    ) -> None:
        scattered = sweep.lockstep or any(each.is_meta for each in sweep.model.parameters())
        if scattered or sweep.factors_device != sweep.device:
            raise InputError("solver: the model and its factors are not all on one device. Score without a solver.")
        if not sweep.task.convex:
            raise InputError(
                f"solver: the loss of {type(sweep.task).__name__} is not convex in what the model returns, so that the "
                "matrix to be solved with may have no inverse that means anything. Score without a solver."
            )
        self.examples = len(train)
        self.space = WeightSpace(sweep.model, sweep.layers)
        self._sweep, self._preconditioner, self._train, self._pairs = sweep, preconditioner, train, pairs
        self.damping = torch.cat([self._damping(*each, damping) for each in self.space.shapes.items()])

    def _damping(self, layer: str, shape: tuple[int, int], given: float | None) -> Tensor:
        """D of a layer's weights, [weights]: its damping, times P^-1 where the filter is conditioned."""
        damping = self._preconditioner.damping.get(layer, given)
        if not damping:
            raise InputError(
                f"damping={given} with a solver: layer {layer!r} would have none, and its curvature alone has no "
                "inverse. Give a number above 0."
            )
        added = torch.full(shape, damping, dtype=self._sweep.dtype, device=self._sweep.device)
        scaling = self._preconditioner.scaling.get(layer)
        return (added if scaling is None else added / scaling.square()).flatten()

    def precondition(self, vectors: Tensor) -> Tensor:
        """What the filter makes of each row of [queries, weights]."""
        matrices = self.space.split(vectors)
        return self.space.join({name: self._preconditioner.apply(name, each) for name, each in matrices.items()})

    def product(self, vectors: Tensor, chosen: Sequence[int] | None = None) -> Tensor:
        """(H + D) v for each row of [queries, weights]; on several processes, each takes a share of the examples.

        Args:
            chosen: the examples that H is a mean over; None is all.
        """
        examples = self._train if chosen is None else self._train.subset(chosen)
        with self._sweep.profile.action(_ACTION):
            with self._sweep.ranks.agreeing():
                total = self._sum(examples, vectors)
            self._sweep.ranks.all_reduce([total])
        return total.div_(len(examples)).addcmul_(vectors, self.damping)

    def _sum(self, examples: Examples[Batch], vectors: Tensor) -> Tensor:
        """This process's part of the sum over examples of H v."""
        sweep, space, total = self._sweep, self.space, torch.empty_like(vectors)
        # As many vectors as examples: of one example, all vectors' weight gradients are moved for a product of few
        # tokens; one vector alone shares its pass with none.
        share, together = sweep.ranks.share(len(examples)), min(len(vectors), math.isqrt(self._pairs))
        with (
            sweep.precision.passes(sweep.device),
            _following(sweep.model, space),
            held_signals() as held,
            Loader(examples, sweep.device, end=share.stop, model=sweep.model) as loader,
        ):
            for some, sums in zip(vectors.split(together), total.split(together), strict=True):
                size = max(1, self._pairs // len(some))
                # Laid out as parameters are, once for all batches: moving weights costs as much as a product of them.
                tangents = {name: each.contiguous() for name, each in space.to_parameters(some).items()}
                added = {name: torch.zeros_like(each) for name, each in tangents.items()}
                for start in range(share.start, share.stop, size):
                    self._add(loader, range(start, min(start + size, share.stop)), tangents, added)
                    if held.received:
                        held.deliver()
                sums.copy_(space.from_parameters(added))
        return total

    def _add(
        self, loader: Loader[Batch], indices: range, tangents: Mapping[str, Tensor], added: Mapping[str, Tensor]
    ) -> None:
        """Add a batch's sum of H v; in halves when memory runs out."""
        model, task = self._sweep.model, self._sweep.task
        vectors = len(next(iter(tangents.values())))
        try:
            batch = loader.load(indices).batch
            found = batch_product(lambda: task.train_loss(model, batch), model, self.space.parameters, tangents)
            for name, each in found.items():
                added[name].add_(each)
            return
        except (RuntimeError, MemoryError) as error:
            pairs = len(indices) * vectors
            if not out_of_memory(error) or pairs == 1:
                raise
        self._pairs = min(self._pairs, pairs // 2)
        if len(indices) > 1:
            middle = len(indices) // 2
            for half in (indices[:middle], indices[middle:]):
                self._add(loader, half, tangents, added)
        else:
            for part in (slice(vectors // 2), slice(vectors // 2, None)):
                some, sums = ({name: each[part] for name, each in both.items()} for both in (tangents, added))
                self._add(loader, indices, some, sums)


@contextmanager
def _following(model: nn.Module, space: WeightSpace) -> Iterator[None]:
    """Passes whose graph begins at the weights of `space`, without fused kernels, which have no forward mode."""
    with frozen(model), through_maps(space.owners), sdpa_kernel(SDPBackend.MATH):
        for parameter in space.parameters.values():
            parameter.requires_grad_()
        yield
