"""Packed sequences: several documents in one, whose positions start again with each: what a model makes of them, and
the documents one by one.

TRL's packing and padding-free collators, and transformers' own, make such sequences, and training with them keeps the
documents apart. Whether a model does so depends on its kind, its attention and the version of transformers, so it is
tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from wherefrom.runtime.errors import InputError
from wherefrom.store.fingerprint import Dataset, checked_length, read_example
from wherefrom.tasks.columns import check_length, vector
from wherefrom.tasks.model_inputs import BOUNDARIES, accepted
from wherefrom.tasks.task import evaluating

# Tokens of each of the two documents that a model is tried with.
_TRIED = 3
# The part of what a document would see of the one before it, of which rounding stays below.
_ROUNDING = 0.05

_tried: WeakKeyDictionary[nn.Module, dict[str, tuple[bool, bool]]] = WeakKeyDictionary()


def positions_of(lengths: object, tokens: int) -> Tensor:
    """Positions from 0 in each document of a sequence, int64 [tokens]; refuses lengths that do not fill it."""
    counts = vector("seq_lengths", lengths)
    if int(counts.sum()) != tokens or bool((counts < 1).any()):
        raise InputError(
            f"'seq_lengths' adds up to {int(counts.sum())} in a sequence of {tokens} tokens: expected the lengths of "
            "the documents in it, as TRL's packing writes them. Cut both in the same way, or rename the column."
        )
    return torch.cat([torch.arange(count) for count in counts.tolist()])


def starts(positions: Tensor) -> Tensor:
    """Where positions [..., tokens] do not go on by one from the token before: boolean [..., tokens - 1]."""
    return positions[..., 1:] != positions[..., :-1] + 1


def check_mask_of_packed(example: Mapping[str, object], positions: Tensor, mask: Tensor) -> None:
    """Refuse an attention mask [tokens] with which documents of one sequence, by its positions, see each other."""
    if bool((mask.diff() > 0).any()):
        raise InputError(
            "'attention_mask' leaves out tokens before others, and there are 'position_ids': of these two, models take "
            "one. Cut the padding off, the positions with it."
        )
    if example.get("attention_mask") is None or not bool(starts(positions[mask.bool()]).any()):
        return
    if example.get("seq_lengths") is not None and bool(mask.all()):
        return  # TRL's training passes no mask on
    raise InputError(
        "'position_ids' start again within the sequence, and there is an 'attention_mask', with which models let its "
        "documents see each other. Leave out the mask if training kept them apart, as TRL's does, and the positions "
        "if it did not."
    )


def check_apart(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Refuse a batch with packed sequences for a model that lets them see each other.

    Whether it does so is found out once, by passes of its own.

    Args:
        batch: with `position_ids`, on the model's device.
    """
    attention = str(getattr(getattr(model, "config", None), "_attn_implementation", ""))
    known = _tried.setdefault(model, {})
    if attention not in known:
        known[attention] = _keeps_apart(model, batch["input_ids"], 1), _keeps_apart(model, batch["input_ids"], 2)
    if known[attention][len(batch["input_ids"]) > 1]:
        return
    begun = starts(batch["position_ids"])
    mask = batch.get("attention_mask")
    if bool((begun if mask is None else begun & mask[:, 1:].bool()).any()):
        alone = "a batch size of 1 keeps them apart, or give" if known[attention][0] else "give"
        raise InputError(
            f"'position_ids' start again within a sequence, and {type(model).__name__} lets the documents of one "
            f"sequence see each other (attention: {attention or 'its own'}); {alone} each document a sequence of "
            "its own."
        )


@torch.no_grad()
def _keeps_apart(model: nn.Module, tokens: Tensor, batch_size: int) -> bool:
    """Whether a document's logits are the same whatever stands before it in its sequence."""
    first = int(tokens[0, 0])
    same = torch.full((batch_size, 2 * _TRIED), first, device=tokens.device)
    other = same.clone()
    other[:, :_TRIED] = int(first == 0)

    def moved(positions: Sequence[int]) -> float:
        """How far the second document's logits move with the tokens of the first."""
        ids = torch.tensor([positions] * batch_size, device=tokens.device)
        found = [
            model(input_ids=each, attention_mask=None, position_ids=ids, use_cache=False).logits[:, _TRIED:]
            for each in (same, other)
        ]
        return float((found[1] - found[0]).double().norm())

    with evaluating(model):
        return not moved([*range(_TRIED)] * 2) > _ROUNDING * moved(range(2 * _TRIED))


def check_positions_taken(model: nn.Module, example: Mapping[str, object]) -> None:
    """Refuse lengths of documents for a model that takes no positions."""
    if example.get("seq_lengths") is not None and "position_ids" not in accepted(model):
        raise InputError(
            f"'seq_lengths' says that sequences hold several documents, and {type(model).__name__} takes no "
            "'position_ids', by which it could tell them apart. Give each document a sequence of its own."
        )


class Document(NamedTuple):
    """Where a document lies: in which packed example, and its tokens there, from `start` up to `stop`."""

    example: int
    start: int
    stop: int


class Unpacked:
    """The documents of a dataset of packed examples, an example each; see `unpacked`.

    Attributes:
        documents: where each lies, in order.
    """

    def __init__(self, dataset: Dataset[object]) -> None:
        self._dataset = dataset
        self._whole = {"seq_lengths"}  # columns that do not have a value for each token, in some example at least
        self._latest: tuple[int, Mapping[str, object]] = -1, {}  # the documents of one example stand beside each other
        count = checked_length("The packed dataset", dataset)
        self.documents = [each for position in range(count) for each in self._documents(position)]

    def __len__(self) -> int:
        """How many documents there are."""
        return len(self.documents)

    def __getitem__(self, position: int, /) -> dict[str, object]:
        at, start, stop = self.documents[position]
        if self._latest[0] != at:
            self._latest = at, self._read(at)
        return {
            name: value if name in self._whole else value[start:stop]  # type: ignore[index]
            for name, value in self._latest[1].items()
            if name not in ("seq_lengths", "text", *BOUNDARIES)
        }

    def _read(self, position: int) -> Mapping[str, object]:
        example = read_example(self._dataset, position)
        if not isinstance(example, Mapping) or example.get("input_ids") is None:
            raise InputError(
                f"Example {position} of the packed dataset is no dict with 'input_ids'. Tokenise it first."
            )
        return example

    def _documents(self, position: int) -> list[Document]:
        example = self._read(position)
        try:
            bounds = _bounds(example)
        except InputError as error:
            raise InputError(f"Example {position} of the packed dataset: {error}") from error
        tokens = len(example["input_ids"])  # type: ignore[arg-type]
        self._whole.update(name for name, value in example.items() if not _each_token(value, tokens))
        return [Document(position, start, stop) for start, stop in pairwise(bounds)]


def unpacked(dataset: Dataset[object]) -> Unpacked:
    """The documents of packed examples as examples of their own, so that each document has a score of its own.

    Of a model that keeps the documents of a sequence apart, a packed example's loss and gradient are the sums of its
    documents'. Columns with a value for each token are cut with the tokens; others are those of the
    packed example, but for `text` and what says where its documents begin.

    Args:
        dataset: dicts with `input_ids`, and with `position_ids` that start again in each document or `seq_lengths`, as
            TRL's packing and transformers' collators write them: a list, or a Hugging Face dataset. Padding, which an
            `attention_mask` of 0 marks at the end, is left out.

    Raises:
        InputError: an example does not say where its documents begin, or has an attention mask with which documents
            were not kept apart.
    """
    return Unpacked(dataset)


def _bounds(example: Mapping[str, object]) -> list[int]:
    """Where the documents of a packed example begin, and where the last one ends."""
    tokens = len(vector("input_ids", example["input_ids"]))
    if example.get("prompt_length") is not None:
        raise InputError("'prompt_length' is of all its documents together. Give 'labels' or a 'completion_mask'.")
    if example.get("position_ids") is not None:
        positions = vector("position_ids", example["position_ids"])
    elif example.get("seq_lengths") is not None:
        positions = positions_of(example["seq_lengths"], tokens)
    else:
        raise InputError("it has neither 'position_ids' nor 'seq_lengths', so nothing says where its documents begin.")
    check_length("position_ids", positions, tokens)
    given = example.get("attention_mask")
    mask = torch.ones(tokens, dtype=torch.int64) if given is None else vector("attention_mask", given)
    check_length("attention_mask", mask, tokens)
    check_mask_of_packed(example, positions, mask)
    real = int(mask.sum())
    return [0, *(starts(positions[:real]).nonzero().flatten() + 1).tolist(), real]


def _each_token(value: object, tokens: int) -> bool:
    """Whether a column has a value for each token."""
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__"):
        return False
    return not (isinstance(value, Tensor) and not value.dim()) and len(value) == tokens
