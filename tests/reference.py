"""Brute force in float64: every gradient by autograd, every curvature as a dense matrix, one example at a time.

Nothing here uses the engine, except for the task's loss and the sampler's draws.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wherefrom.sampling import Sampler
from wherefrom.task import Task

AnyTask = Task[Any]


class BruteForce:
    """Scores of one model, computed the long way.

    Args:
        layers: names of the tracked layers.
        seed: of the sampled targets; None for the dataset's own.
    """

    def __init__(
        self,
        model: nn.Module,
        task: AnyTask,
        layers: Sequence[str],
        train: Sequence[object],
        queries: Sequence[object],
        seed: int | None = None,
    ) -> None:
        self.model = copy.deepcopy(model).double().eval()
        self.task = task
        self.layers = {name: self.model.get_submodule(name) for name in layers}
        samplers = [None if seed is None else Sampler(seed, [row]) for row in range(len(train))]
        self.train = [self.weight_gradients(each) for each in train]
        self.queries = [self.weight_gradients(each, measured=True) for each in queries]
        pairs = list(zip(train, samplers, strict=True))
        self.fisher = [self.weight_gradients(example, sampler) for example, sampler in pairs]
        self.tokens = [self.token_tensors(example, sampler) for example, sampler in pairs]

    def weight_gradients(
        self, example: object, sampler: Sampler | None = None, measured: bool = False
    ) -> dict[str, Tensor]:
        """The gradient of one example alone, [out, in (+1)] for each layer, by autograd on the weights."""
        batch = self.task.collate([example])

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            model = _Stateless(self.model, parameters)
            return self.task.measurement(model, batch) if measured else self.task.train_loss(model, batch, sampler)

        gradients = torch.func.grad(loss)(dict(self.model.named_parameters()))
        return {name: self._matrix(name, gradients) for name in self.layers}

    def _matrix(self, name: str, gradients: dict[str, Tensor]) -> Tensor:
        weight = gradients[f"{name}.weight"]
        if type(self.layers[name]).__name__ == "Conv1D":
            weight = weight.T
        bias = gradients.get(f"{name}.bias")
        return weight if bias is None else torch.cat([weight, bias[:, None]], 1)

    def token_tensors(self, example: object, sampler: Sampler | None) -> dict[str, tuple[Tensor, Tensor]]:
        """Inputs [tokens, in (+1)] and output gradients [tokens, out] of each layer, over all of its calls."""
        inputs: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        outputs: dict[str, list[Tensor]] = {name: [] for name in self.layers}

        def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
            def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
                inputs[name].append(arguments[0].detach())
                added = torch.zeros_like(output, requires_grad=True)
                outputs[name].append(added)
                return output + added

            return hook

        handles = [module.register_forward_hook(watch(name)) for name, module in self.layers.items()]
        loss = self.task.train_loss(self.model, self.task.collate([example]), sampler)
        found = {}
        for name, module in self.layers.items():
            flat = [each.reshape(-1, each.shape[-1]) for each in inputs[name]]
            activations = torch.cat(flat)
            if module.bias is not None:
                activations = torch.cat([activations, torch.ones(len(activations), 1, dtype=torch.float64)], 1)
            gradients = torch.autograd.grad(loss, outputs[name], retain_graph=True, materialize_grads=True)
            found[name] = (activations, torch.cat([each.reshape(-1, each.shape[-1]) for each in gradients]))
        for handle in handles:
            handle.remove()
        return found

    def curvature(self, strategy: str, layer: str) -> Tensor:
        """The undamped curvature of a layer as a dense matrix over its flattened [out, in] weight."""
        rows = torch.stack([each[layer].flatten() for each in self.fisher])  # [examples, out * in]
        activations = torch.cat([each[layer][0] for each in self.tokens])
        gradients = torch.cat([each[layer][1] for each in self.tokens])
        a = activations.T @ activations / len(activations)
        s = gradients.T @ gradients / len(gradients)
        return _dense(strategy, rows, a, s)

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
            added = 0.1 * float(matrix.detach().diagonal().mean()) if damping is None else damping
            damped = matrix + added * torch.eye(len(matrix), dtype=torch.float64)
            total += left @ torch.linalg.solve(damped, right.T)
        return total


def _dense(strategy: str, rows: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """[out * in, out * in], from per-example gradients (rows) and the two covariances."""
    if strategy == "diagonal":
        return torch.diag(rows.square().mean(0))
    if strategy == "kfac":
        return torch.kron(s, a)
    basis = torch.kron(torch.linalg.eigh(s).eigenvectors, torch.linalg.eigh(a).eigenvectors)
    eigenvalues = (rows @ basis).square().mean(0)
    return basis @ torch.diag(eigenvalues) @ basis.T


class _Stateless(nn.Module):
    """A model called with given parameters, so that `torch.func` can differentiate with respect to them."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self._model = [model]  # in a list, so that it is no submodule with parameters of its own
        self._values = parameters

    def forward(self, *args: object, **kwargs: object) -> object:
        return torch.func.functional_call(self._model[0], self._values, args, kwargs)
