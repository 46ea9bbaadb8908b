"""Brute force in float64: every gradient by autograd, every curvature as a dense matrix, one example at a time.

Nothing here uses the engine, except for the task's loss and the sampler's draws. What a layer's weight is as a matrix,
and what its tokens see, is written here once more, in another way where there is one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wherefrom.tasks.sampling import Sampler
from wherefrom.tasks.task import Task

AnyTask = Task[Any]


class BruteForce:
    """Scores of one model, computed the long way.

    Args:
        layers: names of the tracked layers.
        seed: of the sampled targets; None for the dataset's own.
        widest: covariances of more features count with their diagonal alone.
    """

    def __init__(
        self,
        model: nn.Module,
        task: AnyTask,
        layers: Sequence[str],
        train: Sequence[object],
        queries: Sequence[object],
        seed: int | None = None,
        widest: int = 10**9,
    ) -> None:
        self.model = copy.deepcopy(model).double().eval()
        self.task = task
        self.widest = widest
        # Every module that uses the layer's weight; the first that is no embedding says what is a row of its matrix.
        self.layers = {name: _users(self.model, self.model.get_submodule(name).weight) for name in layers}
        samplers = [None if seed is None else Sampler(seed, [row]) for row in range(len(train))]
        self.train = [self.weight_gradients(each) for each in train]
        self.queries = [self.weight_gradients(each, measured=True) for each in queries]
        pairs = list(zip(train, samplers, strict=True))
        self.fisher = [self.weight_gradients(example, sampler) for example, sampler in pairs]
        self.tokens = [self.token_tensors(example, sampler) for example, sampler in pairs]

    def vectors(self, gradients: Sequence[dict[str, Tensor]]) -> Tensor:
        """Gradients of examples, all layers of each one after the other, [examples, weights]."""
        return torch.stack([torch.cat([each[name].flatten() for name in self.layers]) for each in gradients]).detach()

    def weight_gradients(
        self, example: object, sampler: Sampler | None = None, measured: bool = False
    ) -> dict[str, Tensor]:
        """The gradient of one example alone, [out, in (+1)] for each layer, by autograd on the weights."""
        batch = self.task.collate([example])

        names, weights = zip(*self.model.named_parameters(), strict=True)
        for weight in weights:
            weight.requires_grad_()
        if measured:
            loss = self.task.measurement(self.model, batch)
        else:
            loss = self.task.train_loss(self.model, batch, sampler)
        found = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        gradients = dict(zip(names, found, strict=True))
        return {name: self.matrix(name, gradients) for name in self.layers}

    def matrix(self, name: str, gradients: Mapping[str, Tensor]) -> Tensor:
        """A layer's matrix [out, in (+1)] of numbers that are given by parameter names."""
        module, weight = _main(self.layers[name]), gradients[f"{name}.weight"]
        bias = gradients.get(f"{name}.bias")
        if _is_norm(module):
            return weight.flatten()[None] if bias is None else torch.cat([weight.flatten(), bias.flatten()])[None]
        weight = weight.T if type(module).__name__ in {"Conv1D", "Embedding"} else weight.flatten(1)
        return weight if bias is None else torch.cat([weight, bias[:, None]], 1)

    def conditioned(self, numbers: Mapping[str, Tensor]) -> BruteForce:
        """The same with every gradient multiplied with the roots of numbers, which are given by parameter names."""
        roots = {name: self.matrix(name, numbers).sqrt() for name in self.layers}
        found = copy.copy(self)
        for kind in ("train", "queries", "fisher"):
            scaled = [{name: roots[name] * each[name] for name in roots} for each in getattr(self, kind)]
            setattr(found, kind, scaled)
        return found

    def token_tensors(self, example: object, sampler: Sampler | None) -> dict[str, tuple[Tensor, Tensor]]:
        """Inputs [tokens, in (+1)] and output gradients [tokens, out] of each layer, over all of its calls."""
        inputs: dict[str, list[tuple[nn.Module, Tensor]]] = {name: [] for name in self.layers}
        outputs: dict[str, list[Tensor]] = {name: [] for name in self.layers}

        def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
            def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
                inputs[name].append((module, arguments[0].detach()))
                added = torch.zeros_like(output, requires_grad=True)
                outputs[name].append(added)
                return output + added

            return hook

        handles = [each.register_forward_hook(watch(name)) for name, users in self.layers.items() for each in users]
        loss = self.task.train_loss(self.model, self.task.collate([example]), sampler)
        found = {}
        for name, users in self.layers.items():
            gradients = torch.autograd.grad(loss, outputs[name], retain_graph=True, materialize_grads=True)
            turned = not isinstance(_main(users), nn.Embedding)
            parts = [
                vectors[::-1] if turned and isinstance(module, nn.Embedding) else vectors
                for module, vectors in (
                    (module, _vectors(module, seen, gradient))
                    for (module, seen), gradient in zip(inputs[name], gradients, strict=True)
                )
            ]
            found[name] = (torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]))
        for handle in handles:
            handle.remove()
        return found

    def curvature(self, strategy: str, layer: str) -> Tensor:
        """The undamped curvature of a layer as a dense matrix over its flattened [out, in] weight."""
        rows = torch.stack([each[layer].flatten() for each in self.fisher])  # [examples, out * in]
        activations = torch.cat([each[layer][0] for each in self.tokens])
        gradients = torch.cat([each[layer][1] for each in self.tokens])
        a, s = (
            moment if len(moment) <= self.widest else moment.diagonal().diag()
            for moment in (each.T @ each / max(len(each), 1) for each in (activations, gradients))
        )
        if strategy == "shampoo":
            s, a = self.whole_moments(layer, rows.view(len(rows), len(s), len(a)))
        return dense(strategy, rows, a, s)

    def whole_moments(self, layer: str, matrices: Tensor) -> list[Tensor]:
        """E[G G^T] and E[G^T G] of a layer's gradients [examples, out, in], or their diagonals as matrices."""
        outputs, inputs = matrices.shape[1:]
        one_hot = isinstance(_main(self.layers[layer]), nn.Embedding)
        diagonal = outputs > self.widest, inputs > self.widest or one_hot
        moments = (torch.einsum("eoi,epi->op", matrices, matrices), torch.einsum("eoi,eoj->ij", matrices, matrices))
        means = [each / len(matrices) for each in moments]
        return [each.diagonal().diag() if alone else each for each, alone in zip(means, diagonal, strict=True)]

    def scores(self, strategy: str, damping: float | None = None) -> Tensor:
        """Scores [query, train]: dense solves, layer by layer."""
        total = torch.zeros(len(self.queries), len(self.train), dtype=torch.float64)
        for layer in self.layers:
            left = torch.stack([each[layer].flatten() for each in self.queries])
            right = torch.stack([each[layer].flatten() for each in self.train])
            if strategy == "identity":
                total += left @ right.T
                continue
            matrix = self.curvature(strategy, layer)
            if not matrix.any() and damping is None:
                continue  # without curvature, the pseudo-inverse is 0
            added = 0.1 * float(matrix.detach().diagonal().mean()) if damping is None else damping
            damped = matrix + added * torch.eye(len(matrix), dtype=torch.float64)
            total += left @ torch.linalg.solve(damped, right.T)
        return total


def gradient_products(
    model: nn.Module, task: AnyTask, tracked: Callable[[str], bool], train: Sequence[object], queries: Sequence[object]
) -> Tensor:
    """Scores [query, train] without curvature: autograd on the parameters with a tracked name, an example at a time."""
    model = copy.deepcopy(model).double().eval()
    parameters = [each for name, each in model.named_parameters() if tracked(name)]

    def gradients(examples: Sequence[object]) -> Tensor:
        losses = (task.train_loss(model, task.collate([each])) for each in examples)
        found = (torch.autograd.grad(loss, parameters) for loss in losses)
        return torch.stack([torch.cat([each.flatten() for each in one]) for one in found])

    return gradients(queries) @ gradients(train).T


def dense(strategy: str, rows: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """[out * in, out * in], from per-example gradients (rows) and the two covariances."""
    if strategy == "diagonal":
        return torch.diag(rows.square().mean(0))
    if strategy == "kfac":
        return torch.kron(s, a)
    basis = torch.kron(_eigenvectors(s), _eigenvectors(a))
    eigenvalues = (rows @ basis).square().mean(0)
    return basis @ torch.diag(eigenvalues) @ basis.T


def _eigenvectors(matrix: Tensor) -> Tensor:
    """Those of a diagonal matrix are the axes, also where eigenvalues are equal."""
    diagonal = torch.equal(matrix, matrix.diagonal().diag())
    axes = torch.eye(len(matrix), dtype=torch.float64)
    return axes if diagonal else torch.linalg.eigh(matrix).eigenvectors.contiguous()


def _users(model: nn.Module, weight: object) -> list[nn.Module]:
    return [module for module in model.modules() if getattr(module, "weight", None) is weight]


def _main(users: Sequence[nn.Module]) -> nn.Module:
    return next((each for each in users if not isinstance(each, nn.Embedding)), users[0])


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm")


def _vectors(module: nn.Module, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """One call on one example: [tokens, in (+1)] and [tokens, out], whose products are the weight's gradient."""
    if isinstance(module, nn.Embedding):
        rows = torch.eye(module.num_embeddings, dtype=torch.float64)
        if module.padding_idx is not None:
            rows[module.padding_idx] = 0
        return rows[inputs.flatten()], gradient.reshape(-1, module.embedding_dim)
    if _is_norm(module):
        return _normalisation_vectors(module, inputs, gradient)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        activations, gradients = _convolution_vectors(module, inputs, gradient)
    else:
        activations, gradients = inputs.reshape(-1, inputs.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    if module.bias is not None:
        activations = torch.cat([activations, torch.ones(len(activations), 1, dtype=torch.float64)], 1)
    return activations, gradients


def _normalisation_vectors(module: Any, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Textbook formulas, and each token's own gradient as its activations."""
    shape = module.weight.shape
    over = tuple(range(-len(shape), 0))
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        epsilon = torch.finfo(torch.float64).eps if module.eps is None else module.eps
        centred = inputs - inputs.mean(over, keepdim=True) if isinstance(module, nn.LayerNorm) else inputs
        normalised = centred / (centred.square().mean(over, keepdim=True) + epsilon).sqrt()
    else:  # those of transformers compute in float32, whatever the model's type
        normalised = module.forward(inputs).detach() / module.weight.detach()
    parts = [gradient * normalised] + [gradient] * (getattr(module, "bias", None) is not None)
    each = torch.cat([part.reshape(-1, shape.numel()) for part in parts], 1)
    return each, torch.ones(len(each), 1, dtype=torch.float64)


def _convolution_vectors(module: Any, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Patches as PyTorch's own convolution with kernels that each pick one number of the patch."""
    found = []
    for group in range(module.groups):
        channels = inputs.shape[1] // module.groups
        size = channels * math.prod(module.kernel_size)
        picks = type(module)(
            channels, size, module.kernel_size, module.stride, module.padding, module.dilation,
            bias=False, padding_mode=module.padding_mode, dtype=torch.float64,
        )  # fmt: skip
        picks.weight = nn.Parameter(torch.eye(size, dtype=torch.float64).view_as(picks.weight), requires_grad=False)
        patches = picks(inputs[:, group * channels : (group + 1) * channels])
        own = torch.zeros_like(gradient)
        outputs = slice(group * gradient.shape[1] // module.groups, (group + 1) * gradient.shape[1] // module.groups)
        own[:, outputs] = gradient[:, outputs]
        found.append((patches.flatten(2)[0].T, own.flatten(2)[0].T))
    return torch.cat([each[0] for each in found]), torch.cat([each[1] for each in found])
