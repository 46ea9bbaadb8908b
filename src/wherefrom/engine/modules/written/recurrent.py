"""`nn.RNN`, `nn.GRU` and `nn.LSTM`, one step after another; their own code is a single function for all steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from wherefrom.engine.modules.linear_map import LinearMap, Map, Part
from wherefrom.runtime.errors import LayerError

State = tuple[Tensor, ...]
"""After a step, [batch, features] each: the output h and, of an LSTM, the cell c."""


def recurrent_maps(module: nn.Module) -> dict[str, LinearMap]:
    """One for each weight, by its name, with the bias of that name: `weight_ih_l0`, `weight_hh_l0` and so on."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    biases = {name: name.replace("weight", "bias") for name in names if name.startswith("weight")}
    return {
        name: LinearMap(Part(module, name), Part(module, bias) if bias in names else None)
        for name, bias in biases.items()
    }


def recurrent_forward(module: nn.Module, maps: Mapping[str, Map]) -> Callable[..., tuple[object, object]]:
    """The module's forward in evaluation mode; maps read [batch, tokens, features], where each step is a token."""
    assert isinstance(module, nn.RNNBase)

    def forward(input: Tensor | PackedSequence, hx: Tensor | State | None = None) -> tuple[object, object]:
        alone = isinstance(input, Tensor) and input.dim() == 2
        inputs, real = _batch_first(module, input)
        first = _zeros(module, inputs) if hx is None else hx if isinstance(hx, tuple) else (hx,)
        if alone and hx is not None:
            first = tuple(each.unsqueeze(1) for each in first)  # [layers * directions, batch, features]
        last: list[State] = []
        for layer in range(module.num_layers):
            outputs = []
            for end in ("", "_reverse")[: 1 + module.bidirectional]:
                own = [maps.get(f"weight_{name}_l{layer}{end}") for name in ("ih", "hh", "hr")]
                state = tuple(each[len(last)] for each in first)
                output, state = _Unrolled(_STEPS[module.mode], own, real, backward=bool(end))(inputs, state)
                outputs.append(output)
                last.append(state)
            inputs = torch.cat(outputs, -1)
        states = [torch.stack(each) for each in zip(*last, strict=True)]
        states = [each.squeeze(1) for each in states] if alone else states
        return _as_given(module, input, inputs), tuple(states) if module.mode == "LSTM" else states[0]

    return forward


@dataclass(frozen=True)
class _Unrolled:
    """One layer in one direction.

    Attributes:
        step: the next state from what is made of a step's input and of the output before it, [batch, gates] each, and
            from the state before it.
        maps: of inputs, of outputs of the step before, and of an LSTM's outputs if it projects them.
        real: [batch, tokens, 1]; the other tokens leave the state as it is.
    """

    step: Callable[[Tensor, Tensor, State], State]
    maps: Sequence[Map | None]
    real: Tensor | None
    backward: bool

    def __call__(self, inputs: Tensor, first: State) -> tuple[Tensor, State]:
        """Outputs [batch, tokens, features], and the last state.

        Each map is called for all steps at once. What it reads is known after a first run, without a graph; what it
        gives is added to that of single steps, less its own value: its gradient is that of the steps, in one tensor.
        Nothing else has a gradient of the weights.
        """
        of_inputs, of_outputs, projection = self.maps
        assert of_inputs is not None and of_outputs is not None
        read, nothing = of_inputs(inputs).unbind(1), [0] * inputs.shape[1]
        with torch.no_grad():
            before, unprojected, *_ = self._run(read, first, nothing, nothing)
        # Detached, since there are derivatives in forward mode as well, which know no `no_grad`.
        recalled = _without_value(of_outputs(before.detach()))
        projected = nothing if projection is None else _without_value(projection(unprojected.detach()))
        _, _, outputs, last = self._run(read, first, recalled, projected)
        return outputs, last

    def _run(
        self, read: Sequence[Tensor], first: State, recalled: Sequence[Tensor | int], projected: Sequence[Tensor | int]
    ) -> tuple[Tensor, Tensor, Tensor, State]:
        """Outputs before each step, after it and unprojected, and after it, [batch, tokens, features]; the last state.

        Args:
            read: what is made of each step's input, [batch, gates].
            recalled, projected: what is added to what the maps make in each step.
        """
        _, recall, project = (None if each is None else _without_gradient(each) for each in self.maps)
        assert recall is not None
        steps, state = [], first
        order = range(len(read))[:: -1 if self.backward else 1]
        for token in order:
            new = self.step(read[token], recall(state[0]) + recalled[token], state)
            unprojected = new[0]
            if project is not None:
                new = (project(unprojected) + projected[token], *new[1:])
            if self.real is not None:
                new = tuple(torch.where(self.real[:, token], *each) for each in zip(new, state, strict=True))
            steps.append((state[0], unprojected, new[0]))
            state = new
        ordered = [steps[place] for place in order]  # by token: either order is its own inverse
        before, unprojected, outputs = (torch.stack(each, 1) for each in zip(*ordered, strict=True))
        return before, unprojected, outputs, state


def _without_gradient(linear_map: Map) -> Callable[[Tensor], Tensor]:
    """What a map computes, with a weight and a bias that are constants."""
    weight, bias = linear_map.weight.detach(), linear_map.bias
    return partial(functional.linear, weight=weight, bias=None if bias is None else bias.detach())


def _without_value(given: Tensor) -> Sequence[Tensor]:
    """Zeros for each step, whose gradient goes to what a map has given, [batch, tokens, features]."""
    return (given - given.detach()).unbind(1)


def _zeros(module: nn.RNNBase, inputs: Tensor) -> State:
    """The state before the first step, [layers * directions, batch, features]."""
    count = module.num_layers * (1 + module.bidirectional)
    sizes = [module.proj_size or module.hidden_size, module.hidden_size]
    return tuple(inputs.new_zeros(count, len(inputs), size) for size in sizes[: 1 + (module.mode == "LSTM")])


def _batch_first(module: nn.RNNBase, given: Tensor | PackedSequence) -> tuple[Tensor, Tensor | None]:
    """Inputs [batch, tokens, features], and which tokens are real, [batch, tokens, 1], where some are not."""
    if isinstance(given, Tensor):
        return given[None] if given.dim() == 2 else given if module.batch_first else given.transpose(0, 1), None
    if given.sorted_indices is None and given.batch_sizes[0] > 1:
        raise LayerError(
            f"{type(module).__name__} reads a PackedSequence that was made of sorted sequences, so that nothing tells "
            "which example each of them is. Give pack_padded_sequence the batch as it is, with enforce_sorted=False, "
            "or leave the module out with `layers=[...]`."
        )
    inputs, lengths = pad_packed_sequence(given, batch_first=True)
    real = torch.arange(inputs.shape[1]) < lengths.unsqueeze(1)
    return inputs, real.unsqueeze(2).to(inputs.device)


def _as_given(module: nn.RNNBase, given: Tensor | PackedSequence, outputs: Tensor) -> Tensor | PackedSequence:
    """Outputs [batch, tokens, features] laid out as the inputs."""
    if isinstance(given, Tensor):
        return outputs[0] if given.dim() == 2 else outputs if module.batch_first else outputs.transpose(0, 1)
    ordered = outputs if given.sorted_indices is None else outputs[given.sorted_indices]
    rows = [ordered[:size, token] for token, size in enumerate(given.batch_sizes.tolist())]
    return given._replace(data=torch.cat(rows))


def _tanh_step(read: Tensor, recalled: Tensor, state: State) -> State:
    return ((read + recalled).tanh(),)


def _relu_step(read: Tensor, recalled: Tensor, state: State) -> State:
    return ((read + recalled).relu(),)


def _gru_step(read: Tensor, recalled: Tensor, state: State) -> State:
    (reset, update, new), (own_reset, own_update, own_new) = read.chunk(3, 1), recalled.chunk(3, 1)
    new = (new + (reset + own_reset).sigmoid() * own_new).tanh()
    return (new + (update + own_update).sigmoid() * (state[0] - new),)


def _lstm_step(read: Tensor, recalled: Tensor, state: State) -> State:
    enter, forget, new, leave = (read + recalled).chunk(4, 1)
    cell = forget.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * cell.tanh(), cell


_STEPS = {"RNN_TANH": _tanh_step, "RNN_RELU": _relu_step, "GRU": _gru_step, "LSTM": _lstm_step}
