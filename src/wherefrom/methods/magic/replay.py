"""A training walked backwards without storing all of its states: few are stored, the others are computed again.

This is REPLAY of Engstrom et al. 2025 (arXiv 2503.13751): the steps are the leaves of a tree, of which one path is open
at a time. This module knows states and steps; it must not know what a step does, nor what its state is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from wherefrom.runtime.errors import check_argument
from wherefrom.store.files import remove, write_tensors


class StoredStates:
    """States of a training by the step that they stand before; in the host's memory, or in files of a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._states: dict[int, Tensor | Path] = {}

    def __contains__(self, step: int) -> bool:
        return step in self._states

    def __len__(self) -> int:
        return len(self._states)

    def store(self, step: int, state: Tensor) -> None:
        """Store a state, exactly.

        Raises:
            StorageError: it cannot be written.
        """
        if self._folder is None:
            self._states[step] = state.detach().cpu()
            return
        file = self._folder / f"{step}.safetensors"
        write_tensors(file, {"state": state}, {})
        self._states[step] = file

    def get(self, step: int, device: torch.device) -> Tensor:
        """A state that is stored, on a device."""
        found = self._states[step]
        return (load_file(found)["state"] if isinstance(found, Path) else found).to(device)

    def discard(self, step: int) -> None:
        """Store it no longer."""
        found = self._states.pop(step)
        if isinstance(found, Path):
            remove(found)


class Replay:
    """The steps of a training, forwards and then backwards.

    With a `branching` of k, k log_k(steps) states are stored at once, and every step is taken again log_k(steps) - 1
    times; with k the root of the number of steps, these are two roots' worth of states, and each step once more.

    Args:
        start: the state before the first step.
        advance: (state, step) -> the state after the step, always the same bits.
        steps: how many there are.
        branching: parts that a stretch of steps is cut into; None is the root of their number, rounded up.
        states: where they are stored.

    Raises:
        InputError: `branching` is less than 2.
    """

    def __init__(
        self,
        start: Tensor,
        advance: Callable[[Tensor, int], Tensor],
        steps: int,
        branching: int | None = None,
        states: StoredStates | None = None,
    ) -> None:
        check_argument(branching is None or branching >= 2, "branching", branching, "at least 2, or None")
        self._advance, self._steps, self._device = advance, steps, start.device
        self._branching = branching or max(2, math.isqrt(steps - 1) + 1)
        self._states = StoredStates() if states is None else states
        self._states.store(0, start)

    def forwards(self) -> Tensor:
        """Take all steps: the last state. Those where parts begin are stored for the way back."""
        return self._walk(self._parts(0, self._steps), self._steps)

    def backwards(self) -> Iterator[tuple[int, Tensor]]:
        """Each step with the state before it, the last step first; once only."""
        return self._unwound(0, self._steps)

    def _unwound(self, first: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """Those from `first`, whose state is stored, to before `end`."""
        if end - first == 1:
            state = self._states.get(first, self._device)
            self._states.discard(first)
            yield first, state
            return
        parts = self._parts(first, end)
        if parts[-1] not in self._states:
            self._walk(parts, parts[-1])
        for part in reversed(parts):
            yield from self._unwound(part, min(part + parts.step, end))

    def _parts(self, first: int, end: int) -> range:
        """Where the parts of a stretch begin."""
        return range(first, end, math.ceil((end - first) / self._branching))

    def _walk(self, parts: range, end: int) -> Tensor:
        """Go from the stored state before the first part to that before `end`, and store those before the others."""
        state = self._states.get(parts[0], self._device)
        for step in range(parts[0], end):
            state = self._advance(state, step)
            if step + 1 in parts:
                self._states.store(step + 1, state)
        return state
