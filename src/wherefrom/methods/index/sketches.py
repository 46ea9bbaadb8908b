"""Sketches of gradients: whitened, added up in a few counters, and packed into bits.

In the eigenbasis of the curvature a gradient is multiplied with (Lambda + damping)^-1/2, so that a score of factors is
a plain dot product of two such gradients. That of two CountSketches (Charikar et al. 2002) is on average the same:
every weight has a random sign and one of a few counters, in which the weights of all layers are added up. Of what is
stored, a counter's sign alone may be kept. This module knows captured tensors and operators; it does not know where
anything is stored.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from wherefrom.curvature.operators import Operator
from wherefrom.engine.capture import Captured
from wherefrom.engine.example_gradients import weight_gradients
from wherefrom.engine.modules.layers import TrackedLayer
from wherefrom.engine.sweep import Collector
from wherefrom.runtime.errors import InputError, check_argument
from wherefrom.runtime.memory import Workspace
from wherefrom.scoring.tokens import check_tokens
from wherefrom.store.artifacts import Layout

Bits = Literal[1, 8, 32]

# What is stored of examples: their counters, what products with these are to be
# multiplied with, and the norms of whitened gradients; of chunks also which tokens they are.
CODES, SCALES, NORMS, SPANS = "codes", "scales", "norms", "spans"
# What a sweep adds up.
COUNTERS, SQUARES = "counters", "squares"
# The largest whole number of an int8 that has a negative.
LARGEST = 127
# Of how many numbers products with 8-bit numbers add up to no more than 32 bits hold.
_MOST: dict[int, int] = {1: 2**22, 8: 2**17}


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """How the gradients of an index are sketched.

    Attributes:
        numbers: how many counters an example has, of all layers together. Scores of the index are off by about
            sqrt(1 / numbers) of the product of both norms (by 1.25 times that with one bit); with as many as the
            tracked weights, or more, counters hold one weight each.
        bits: of each counter: 1 stores its sign, 8 a whole number, 32 the number itself.
        focus: each direction's part of a score is multiplied with (Lambda / (Lambda + damping))^focus. Directions with
            little curvature have much of the norms, and so of the error, and little of the scores: a smaller index
            gains from leaving most of them out. 0 takes the score as it is.
        seed: of the random signs and counters.
        chunk: store a sketch for every so many tokens of an example, for answers that say which passage; 1 is each
            token alone, None the whole example.

    Raises:
        InputError: one of them is impossible.
    """

    numbers: int = 65_536
    bits: Bits = 1
    focus: float = 2.0
    seed: int = 0
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_argument(self.bits in get_args(Bits), "bits", self.bits, "1, 8 or 32")
        if self.numbers < 64 or self.numbers % 64:  # whole machine words of signs
            raise InputError(f"numbers={self.numbers}: expected a multiple of 64, such as {Sketch.numbers}.")
        check_argument(0 <= self.focus < math.inf, "focus", self.focus, "a number >= 0")
        most = _MOST.get(self.bits, self.numbers)
        if self.numbers > most:
            raise InputError(f"numbers={self.numbers} with bits={self.bits}: expected at most {most}.")
        if self.chunk is not None:
            check_argument(self.chunk >= 1, "chunk", self.chunk, "at least 1 token, or None for whole examples")

    @property
    def label(self) -> str:
        """The settings, in a word: what the name of an index begins with."""
        return f"sketch{self.numbers}-{self.bits}bit" + ("" if self.chunk is None else f"-chunk{self.chunk}")

    @property
    def settings(self) -> dict[str, str]:
        """What a fingerprint says of it."""
        chunk = {} if self.chunk is None else {"chunk": f"{self.chunk} tokens"}
        sketch = f"{self.numbers} numbers, focus {self.focus}, seed {self.seed}"
        return {"sketch": sketch, "bits": str(self.bits), **chunk}

    @classmethod
    def of(cls, settings: Mapping[str, str]) -> Sketch:
        """The sketch whose `settings` are among these."""
        numbers, focus, seed = (part.split()[-1] for part in settings["sketch"].replace(" numbers", "").split(", "))
        bits = {str(each): each for each in get_args(Bits)}[settings["bits"]]
        chunk = int(settings["chunk"].split()[0]) if "chunk" in settings else None
        return cls(numbers=int(numbers), bits=bits, focus=float(focus), seed=int(seed), chunk=chunk)

    @property
    def code_bytes(self) -> int:
        """What the counters of an example take when they are stored."""
        return self.numbers * self.bits // 8

    def layout(self, examples: int) -> Layout:
        """The tensors that are stored of so many examples, or chunks."""
        stored = {1: torch.uint8, 8: torch.int8, 32: None}[self.bits]
        width = self.code_bytes if self.bits == 1 else self.numbers
        spans: Layout = {} if self.chunk is None else {SPANS: (torch.int32, (examples, 2))}
        return {CODES: (stored, (examples, width)), SCALES: (None, (examples,)), NORMS: (None, (examples,)), **spans}

    def packed(self, counters: Tensor, norms: Tensor) -> dict[str, Tensor]:
        """What is stored of counters [examples, numbers] and norms [examples].

        A counter's sign is a bit, 1 where it is 0 or above; the first of eight is a byte's lowest. Its product with the
        counter of a query is on average sqrt(2 / (pi numbers)) / norm of theirs, where counters are normally
        distributed as sums of many are. A whole number is a counter over the example's largest, which is 127.
        """
        if self.bits == 32:
            return {CODES: counters, SCALES: torch.ones_like(norms), NORMS: norms}
        if self.bits == 8:
            codes, scales = whole_numbers(counters)
            return {CODES: codes, SCALES: scales, NORMS: norms}
        signs = np.packbits((counters >= 0).cpu().numpy(), axis=1, bitorder="little")
        return {CODES: torch.from_numpy(signs), SCALES: norms * math.sqrt(math.pi / 2 / self.numbers), NORMS: norms}


def whole_numbers(counters: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers [n, k] as int8, and the scales [n] to multiply them with; the largest of each is 127."""
    scales = counters.abs().amax(1) / LARGEST
    return (counters / torch.where(scales > 0, scales, 1.0).unsqueeze(1)).round_().to(torch.int8), scales


class Projector:
    """The random matrix S of a sketch, one column for each weight, after the filter (Lambda + damping)^-1/2 and focus.

    All weights, layer after layer, stand in one line that is cut into runs of `numbers`. Each run is laid on the
    counters from a random one on, round about, so that two weights of different runs share a counter with a
    probability of 1 / numbers, and two of one run never.

    Attributes:
        transforms: into the eigenbasis, by layer.
    """

    def __init__(
        self,
        sketch: Sketch,
        layers: Mapping[str, TrackedLayer],
        preconditioner: Operator,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.numbers, self.preconditioner = sketch.numbers, preconditioner
        self.transforms = preconditioner.transforms(layers)
        sizes = [layer.shape[0] * layer.width for layer in layers.values()]
        self.ends = dict(zip(layers, accumulate(sizes), strict=True))
        runs = -(-sum(sizes) // self.numbers)
        self.starts = torch.randint(self.numbers, (runs,), generator=_generator(sketch.seed, "runs"))
        self.factors = {
            name: _signs(sketch.seed, name, layer.padded_shape).to(device, dtype) for name, layer in layers.items()
        }
        for name, each in preconditioner.aligned_filters(layers).items():
            curved = (1 - preconditioner.damping[name] * each).clamp_min_(0)  # Lambda / (Lambda + damping)
            self.factors[name] *= (each * curved**sketch.focus).sqrt().to(device)

    def counters(self, layer: str, weights: Tensor) -> Tensor:
        """The counters of a layer's weights, by their number in the layer."""
        line = weights + self._begin(layer)
        return (line + self.starts.to(line.device)[line // self.numbers]) % self.numbers

    def _begin(self, layer: str) -> int:
        outputs, width = self.factors[layer].shape
        return self.ends[layer] - outputs * width

    def add(self, layer: str, gradients: Tensor, totals: Tensor) -> None:
        """Add whitened gradients with random signs, [batch, weights of the layer], to counters [batch, numbers]."""
        begin, end = self._begin(layer), self.ends[layer]
        while begin < end:
            run, position = divmod(begin, self.numbers)
            counter = (position + int(self.starts[run])) % self.numbers
            count = min(self.numbers - max(position, counter), end - begin)  # up to the end of the run, or of the line
            done = begin - self._begin(layer)
            totals[:, counter : counter + count] += gradients[:, done : done + count]
            begin += count


def _signs(seed: int, layer: str, shape: tuple[int, int]) -> Tensor:
    return torch.randint(2, shape, generator=_generator(seed, layer), dtype=torch.int8).mul_(2).sub_(1)


def _generator(seed: int, name: str) -> torch.Generator:
    """Random numbers that depend on the seed and a name alone."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Chunks(NamedTuple):
    """How examples are cut.

    Attributes:
        lengths: how many tokens each has, int64 [examples].
        size: tokens of a chunk; the last one of an example may have fewer.
    """

    lengths: Tensor
    size: int

    @property
    def counts(self) -> Tensor:
        """How many chunks each example has, int64 [examples]."""
        return (-(-self.lengths // self.size)).clamp_min(1)

    @property
    def firsts(self) -> Tensor:
        """How many chunks stand before the first of each example, int64 [examples]."""
        return self.counts.cumsum(0) - self.counts

    @property
    def spans(self) -> Tensor:
        """The first token of each chunk, and the one after its last, int32 [chunks, 2]."""
        lengths, firsts = (each.repeat_interleave(self.counts) for each in (self.lengths, self.firsts))
        starts = (torch.arange(len(lengths)) - firsts) * self.size
        return torch.stack([starts, torch.minimum(starts + self.size, lengths)], 1).int()


class Sketches(Collector):
    """The counters of every example, or of every chunk.

    Args:
        examples: how many there are, or how they are cut.
        training: whether the examples are those that the curvature is of, which has to be there where gradients are.

    Attributes:
        sums: `counters` [examples, numbers], and `squares` [examples]: the squared norms of whitened gradients; of
            chunks, those of an example one after another.
    """

    def __init__(self, projector: Projector, examples: int | Chunks, training: bool, like: Tensor) -> None:
        self._projector, self._training = projector, training
        self._chunks = examples if isinstance(examples, Chunks) else None
        count = examples if isinstance(examples, int) else int(examples.counts.sum())
        self._workspace = Workspace()
        self.sums = {COUNTERS: like.new_zeros(count, projector.numbers), SQUARES: like.new_zeros(count)}

    def collect(self, layer: str, captured: Captured, batch: slice) -> None:
        if self._training:
            self._projector.preconditioner.check_gradients(layer, captured)
        counters, squares = self.sums[COUNTERS], self.sums[SQUARES]
        if self._chunks is None:
            self._add(layer, captured, counters[batch], squares[batch])
            return
        lengths, size = self._chunks.lengths[batch], self._chunks.size
        firsts, longest = self._chunks.firsts[batch], int(lengths.max())
        check_tokens(layer, captured, longest)
        # The first chunk of each example, then the second, so that there are as many gradients as of whole examples.
        for number, start in enumerate(range(0, longest, size)):
            chosen = (lengths > start).nonzero().squeeze(1)
            some = _of_tokens(captured, start, min(start + size, longest), longest).examples(chosen)
            here = (firsts[chosen] + number).to(counters.device)
            totals, norms = counters[here], squares[here]
            self._add(layer, some, totals, norms)
            counters[here], squares[here] = totals, norms

    def _add(self, layer: str, captured: Captured, totals: Tensor, squares: Tensor) -> None:
        """Add a layer's part of some examples to their counters [batch, numbers] and squared norms [batch]."""
        projector = self._projector
        gradients = weight_gradients(captured, projector.transforms[layer], self._workspace)
        gradients *= captured.selected(projector.factors[layer])  # [batch, out, columns]
        gradients = gradients.to(self.sums[COUNTERS].device)
        squares += gradients.square().sum((1, 2))
        if captured.columns is None:
            projector.add(layer, gradients.flatten(1), totals)
            return
        outputs, width = projector.factors[layer].shape
        weights = torch.arange(outputs, device=totals.device).unsqueeze(1) * width
        weights = weights + captured.columns.to(totals.device).unsqueeze(1)  # [batch, out, columns]
        totals.scatter_add_(1, projector.counters(layer, weights).flatten(1), gradients.flatten(1))

    def release(self) -> None:
        self._workspace.release()


def _of_tokens(captured: Captured, start: int, stop: int, length: int) -> Captured:
    """What tokens from `start` to before `stop` of each example, of `length` tokens, add to the gradients."""
    if captured.positions is not None:
        tokens = captured.positions.tokens.to(captured.gradients.device)  # [batch, vectors]
        inside = ((tokens >= start) & (tokens < stop)).unsqueeze(2)
        return captured._replace(gradients=captured.gradients.where(inside, 0))
    activations, gradients = (
        each.unflatten(1, (captured.calls, length))[:, :, start:stop].flatten(1, 2)
        for each in (captured.activations, captured.gradients)
    )
    return captured._replace(activations=activations, gradients=gradients)
