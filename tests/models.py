"""Models and datasets small enough to enumerate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version
from torch import Tensor, nn

import wherefrom as wf
from wherefrom.tasks.sampling import Sampler
from wherefrom.tasks.task import Task

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

VOCABULARY = 13
TRANSFORMERS = Version(version("transformers")).release


class Mlp(nn.Module):
    """Linear layers with and without bias, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.twice = nn.Linear(5, 5)
        self.plain = nn.Linear(5, 3, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.twice(torch.tanh(self.first(inputs)))
        logits: Tensor = self.plain(torch.tanh(self.twice(torch.tanh(hidden))))
        return logits


@dataclass
class Case:
    """A model with its task and data."""

    model: nn.Module
    task: Task[Any]
    train: list[object]
    queries: list[object]


CaseMaker = Callable[[torch.dtype], Case]


def mlp_case(dtype: torch.dtype = torch.float64) -> Case:
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    model = Mlp().to(dtype)
    examples: list[object] = [
        (torch.randn(4, generator=generator).to(dtype), torch.randint(3, (), generator=generator)) for _ in range(17)
    ]
    return Case(model, wf.Classification(), examples[:12], examples[12:])


def gpt2(dtype: torch.dtype = torch.float64, layers: int = 2) -> GPT2LMHeadModel:
    """A GPT-2 of a few thousand weights, large enough in scale that its attention is not uniform."""
    from transformers import GPT2Config, GPT2LMHeadModel  # slow to import, and not every test needs it

    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=12, n_embd=8, n_layer=layers, n_head=2,
        initializer_range=0.4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    nn.Module.to(model, dtype)
    return model


class ManyExamples:
    """Examples of three classes without memory of their own.

    Args:
        inputs, label: shapes of an example's two tensors.
    """

    def __init__(self, count: int, inputs: tuple[int, ...] = (4,), label: tuple[int, ...] = ()) -> None:
        self._count, self._inputs, self._label = count, inputs, label

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        if not 0 <= row < self._count:
            raise IndexError(row)
        return torch.full(self._inputs, row / self._count), torch.full(self._label, row % 3)


def token_rows(count: int, seed: int = 3) -> list[object]:
    """Token sequences of different lengths, so that batches are padded."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 11, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(VOCABULARY, (length,), generator=generator).tolist()} for length in lengths]


def gpt2_case(dtype: torch.dtype = torch.float64) -> Case:
    return Case(gpt2(dtype), wf.CausalLM(["transformer.h.*"]), token_rows(14), token_rows(5, seed=4))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest expected value."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


def widened(examples: list[object]) -> list[object]:
    """Examples with their float tensors in float64."""
    return [
        tuple(each.double() if each.is_floating_point() else each for each in example)
        if isinstance(example, tuple)
        else example
        for example in examples
    ]


class Interrupted(wf.CausalLM):
    """Fails at a batch, as a killed process would."""

    _left: int = 10**9

    def train_loss(self, *arguments: object) -> Tensor:
        if self._left == 0:
            raise KeyboardInterrupt
        self._left -= 1
        return super().train_loss(*arguments)  # type: ignore[arg-type]


class Sequences(wf.Classification):
    """Sequences of vectors of different lengths and their classes; the model is called with a mask of real tokens."""

    def collate(self, examples: Sequence[object]) -> Sequence[Tensor]:
        inputs, labels = zip(*examples, strict=True)
        lengths = torch.tensor([len(each) for each in inputs])
        padded = nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=3.0)
        return padded, torch.arange(padded.shape[1]) < lengths[:, None], torch.stack(labels)

    def mask(self, batch: Sequence[Tensor]) -> Tensor:
        return batch[1]

    def train_loss(self, model: nn.Module, batch: Sequence[Tensor], sampler: Sampler | None = None) -> Tensor:
        inputs, mask, labels = batch
        logits = model(inputs, mask)
        labels = labels if sampler is None else sampler.categorical(logits.detach())
        return nn.functional.cross_entropy(logits, labels, reduction="sum")


def sequences(count: int, seed: int = 6, features: int = 4) -> list[object]:
    """Float64 sequences of two to six vectors, each with one of three classes."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (count,), generator=generator).tolist()
    return [
        (torch.randn(length, features, generator=generator).double(), torch.randint(3, (), generator=generator))
        for length in lengths
    ]
