"""Tasks of Hugging Face language models: causal, masked and encoder-decoder.

Batches are dicts of tensors with the names that these models use; a label of -100 is not counted. The training loss is
always the summed cross-entropy of the counted labels; what is measured on queries may be something else. Every
measurement is lower the more of it there is, as a loss is: a positive score says that training on the example made what
was measured more likely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from wherefrom.runtime.errors import InputError
from wherefrom.tasks import packing
from wherefrom.tasks.adapters.prompts import virtual_tokens
from wherefrom.tasks.columns import (
    batched_columns,
    check_highest,
    check_length,
    check_mask,
    is_batch,
    number,
    tensor,
    vector,
)
from wherefrom.tasks.losses import IGNORED, summed_cross_entropy, summed_log_odds
from wherefrom.tasks.model_inputs import accepted, check_tokens, model_columns, placeholders, selected
from wherefrom.tasks.sampling import Sampler, drawn_cross_entropy
from wherefrom.tasks.task import Task

TokenBatch = dict[str, Tensor]
Measure = Literal["loss", "margin"]

# Columns that say which tokens of an example are counted: 1 = counted. TRL calls them so.
_COUNTING = ("completion_mask", "assistant_masks")
# Columns of an encoder-decoder's decoder, with a number for each of its labels.
_DECODED = ("labels", "decoder_input_ids", "decoder_attention_mask")


@dataclass(frozen=True)
class ChosenToken:
    """Measure one token: minus its log-probability as the next one.

    Attributes:
        token: its number in the vocabulary.
        position: after which of the query's real tokens; 0 is the first, -1 the last.
    """

    token: int
    position: int = -1


class LanguageTask(Task[TokenBatch]):
    """What the tasks of this module have in common; a task is its `predictions`.

    Other columns of examples, such as `token_type_ids`, `position_ids` or `pixel_values`, are given to a model whose
    forward has an argument of that name, and left out if it has none, as a Trainer leaves them out.

    Args:
        layers: as in `Task`.
        measure: of queries: "loss", the summed cross-entropy, or "margin", minus the sum over counted labels of their
            log-odds: the label's logit less the logarithm of the summed exponentials of all others (as in
            TRAK, Park et al. 2023).
    """

    padding: ClassVar[Mapping[str, int]] = {
        "input_ids": 0, "token_type_ids": 0, "position_ids": 0, "attention_mask": 0, "labels": IGNORED
    }  # fmt: skip
    """The columns that have a whole number for each token, and what each is padded with."""

    read: ClassVar[frozenset[str]] = frozenset({"input_ids", "attention_mask", "labels"})
    """The columns that the task reads itself. All others are the model's: passed on if its forward takes them."""

    as_long_as: ClassVar[Mapping[str, str]] = {}
    """The columns that have a number for each of another column than `input_ids`."""

    needed_labels: ClassVar[str | None] = None
    """What `labels` are, of a task that cannot do without them."""

    by_token = True

    def __init__(self, layers: Sequence[str] | None = None, measure: Measure = "loss") -> None:
        super().__init__(layers)
        if measure not in ("loss", "margin"):
            raise InputError(f"measure={measure!r}: {type(self).__name__} has the measures 'loss' and 'margin'.")
        self.measure: Measure | ChosenToken = measure

    def predictions(self, model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Logits [..., classes] of every prediction, and their labels [...], -100 where nothing is counted."""
        raise NotImplementedError(f"{type(self).__name__} must define predictions(model, batch).")

    def targets(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """The labels of every prediction [...], -100 where nothing is counted."""
        return of_real_tokens(batch["labels"], batch)

    @property
    def unit(self) -> str:
        return "log-odds" if self.measure == "margin" else "nats"

    def trained(self, model: nn.Module, batch: TokenBatch) -> int:
        return int((self.targets(model, batch) != IGNORED).sum())

    def select(self, model: nn.Module, example: object) -> object:
        return selected(model, example, self.read) if isinstance(example, Mapping) else example

    def check(self, model: nn.Module, batch: TokenBatch) -> None:
        """Refuse tokens, positions and labels that the model does not have, with an `InputError`."""
        check_tokens(model, self.inputs(model, batch))
        known = self.classes(model)
        if known is not None and "labels" in batch:
            check_highest("labels", batch["labels"], known, "classes")

    def classes(self, model: nn.Module) -> int | None:
        """How many classes a prediction has; None where the model does not say so."""
        known = getattr(self.head(model), "out_features", None)
        return known if isinstance(known, int) else None

    def train_loss(self, model: nn.Module, batch: TokenBatch, sampler: Sampler | None = None) -> Tensor:
        return summed_loss(*self.predictions(model, batch), sampler)

    def measurement(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """What `measure` says, summed over the batch: a scalar; lower is more of it."""
        if self.measure == "loss":
            return self.train_loss(model, batch)
        return -summed_log_odds(*self.predictions(model, batch))

    def mask(self, batch: TokenBatch) -> Tensor | None:
        mask = batch.get("attention_mask")
        return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()

    def head(self, model: nn.Module) -> nn.Module | None:
        find = getattr(model, "get_output_embeddings", None)
        head = find() if callable(find) else None
        return head if isinstance(head, nn.Module) else None

    def collate(self, examples: Sequence[object]) -> TokenBatch:
        """Pad examples on the right to the longest: labels with -100, other columns with 0.

        What is not a number for each token, such as images, is stacked; or concatenated, of examples that are batches
        of one as a processor makes them, with `input_ids` [1, tokens]. Without padding and positions there is no
        attention_mask: a model that is given none can take its fast attention without a look at the values, also when
        it is compiled.
        """
        columns, batches = [self.columns(example) for example in examples], list(map(is_batch, examples))
        if any(batches) and not all(batches):
            raise InputError("some 'input_ids' are [tokens] and others [1, tokens]: expected one of these for all.")
        batch = batched_columns(columns, self.padding, all(batches))
        if "position_ids" not in batch and bool((batch["attention_mask"] == 1).all()):
            del batch["attention_mask"]
        return batch

    def columns(self, example: object) -> TokenBatch:
        """One example's columns, checked: those of tokens as int64 vectors, with an attention mask in any case."""
        if not isinstance(example, Mapping) or example.get("input_ids") is None:
            found = sorted(map(str, example)) if isinstance(example, Mapping) else type(example).__name__
            raise InputError(
                f"{type(self).__name__} needs examples that are dicts with 'input_ids'; found {found}. "
                "Tokenise the dataset first, or write a Task with its own collate."
            )
        others = model_columns(example, self.read)
        own = {name: example[name] for name in self.read & self.padding.keys() if example.get(name) is not None}
        columns = {name: vector(name, value) for name, value in {**own, **others}.items() if name in self.padding}
        if not len(columns["input_ids"]):
            raise InputError("'input_ids' is empty: expected at least one token. Leave the example out.")
        if bool((columns["input_ids"] < 0).any()):
            raise InputError(
                f"'input_ids' holds {int(columns['input_ids'].min())}, which is no token. Mark padding with an "
                "attention_mask of 0, and what is not counted with labels of -100."
            )
        columns.setdefault("attention_mask", torch.ones_like(columns["input_ids"]))
        if self.needed_labels is not None and "labels" not in columns:
            name = type(self).__name__
            raise InputError(f"{name} needs examples with 'labels': {self.needed_labels}; found {sorted(columns)}.")
        for name, values in columns.items():
            other = self.as_long_as.get(name, "input_ids")
            check_length(name, values, len(columns[other]), other)
        check_mask(columns["attention_mask"])
        rest = {name: tensor(name, others[name]) for name in others.keys() - self.padding.keys()}
        if is_batch(example):
            tokens = (1, len(columns["input_ids"]))
            rest = {name: each[0] if each.shape[:2] == tokens else each for name, each in rest.items()}
        return columns | rest

    def inputs(self, model: nn.Module, batch: TokenBatch) -> TokenBatch:
        """What the model is called with: tokens, their mask, and the columns that its forward takes."""
        taken = (accepted(model) - self.read) | {"input_ids", "attention_mask"}
        return {name: each for name, each in batch.items() if name in taken}


class CausalLM(LanguageTask):
    """Next-token prediction with a Hugging Face causal language model.

    Batches are dicts with `input_ids` [batch, tokens] and, optionally, `attention_mask` (1 = real token) and `labels`
    (-100 = not counted; the inputs themselves by default). The loss is the cross-entropy summed over counted tokens.
    Examples of different lengths are padded on the right when they are collated.

    To count only a completion, give examples `labels` that are -100 on the prompt, a `prompt_length`, or a
    `completion_mask` or `assistant_masks` as TRL makes them (1 = counted).

    An example may hold several documents, packed as TRL and transformers do, with `position_ids` that start from 0 in
    each, or their `seq_lengths`. They do not see each other, and as in training a document's first token is not
    predicted: losses and gradients are the sums of those of the documents alone.

    Images and sounds are passed on as the processor made them, such as `pixel_values`. Without `labels`, the tokens
    that they take the places of are not counted.

    Args:
        layers: as in `Task`.
        measure: of queries: "loss", "margin" (see `LanguageTask`), or a `ChosenToken`. Lower is more of each.
    """

    read: ClassVar[frozenset[str]] = LanguageTask.read.union(_COUNTING, ("prompt_length", "seq_lengths"))

    def __init__(self, layers: Sequence[str] | None = None, measure: Measure | ChosenToken = "loss") -> None:
        super().__init__(layers, "loss" if isinstance(measure, ChosenToken) else measure)
        self.measure = measure

    def predictions(self, model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        return self._logits(model, batch), self.targets(model, batch)

    def targets(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        # The labels are shifted, not the logits: a slice of those would be copied, and filled up again going back.
        labels = of_real_tokens(functional.pad(_labels(batch)[:, 1:], (0, 1), value=IGNORED), batch)
        virtual = virtual_tokens(model)
        if virtual:  # of these, the last predicts the text's first
            labels = torch.cat([_labels(batch)[:, :1], labels], 1)
            labels = functional.pad(labels, (virtual - 1, 0), value=IGNORED)
        return labels

    def counted(self, model: nn.Module, batch: TokenBatch) -> int:
        return 1 if isinstance(self.measure, ChosenToken) else super().counted(model, batch)

    def measurement(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        if not isinstance(self.measure, ChosenToken):
            return super().measurement(model, batch)
        logits = self._logits(model, batch)
        mask = self.mask(batch)
        assert mask is not None
        positions = _token_positions(mask, self.measure.position)
        each = torch.arange(len(positions), device=positions.device)
        after = logits[each, positions + virtual_tokens(model)]  # [batch, classes]
        if not 0 <= self.measure.token < after.shape[1]:
            raise InputError(f"measure={self.measure}: the model's vocabulary has tokens 0 to {after.shape[1] - 1}.")
        return summed_cross_entropy(after, torch.full_like(positions, self.measure.token))

    def _logits(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """Logits [batch, tokens, classes] of what follows each token, those of a learned prompt first."""
        inputs = self.inputs(model, batch)
        # Models keep packed documents apart only without a mask, which tells them nothing: padding comes last.
        mask = None if "position_ids" in inputs else inputs.get("attention_mask")
        logits: Tensor = model(**{**inputs, "attention_mask": mask}, use_cache=False).logits
        return logits

    def select(self, model: nn.Module, example: object) -> object:
        if not isinstance(example, Mapping):
            return example
        packing.check_positions_taken(model, example)
        marks, ids, mask = placeholders(model), example.get("input_ids"), example.get("attention_mask")
        if len(marks) and example.get("token_type_ids") is None and "token_type_ids" in accepted(model):
            raise InputError(
                f"there are no 'token_type_ids', by which {type(model).__name__} tells images from text, and without "
                "which padding would change what it says. Give them as the processor makes them."
            )
        if len(marks) and ids is not None and example.get("labels") is None:
            tokens = vector("input_ids", ids)
            uncounted = torch.isin(tokens, marks)
            uncounted |= False if mask is None else vector("attention_mask", mask) == 0
            example = {**example, "labels": tokens.masked_fill(uncounted, IGNORED)}
        return super().select(model, example)

    def verify(self, model: nn.Module, batch: TokenBatch) -> None:
        if "position_ids" in self.inputs(model, batch):
            packing.check_apart(model, batch)

    def columns(self, example: object) -> TokenBatch:
        columns = super().columns(example)
        assert isinstance(example, Mapping)
        if example.get("seq_lengths") is not None and "position_ids" not in columns:
            columns["position_ids"] = packing.positions_of(example["seq_lengths"], len(columns["input_ids"]))
        labels = _labels(columns)
        if "position_ids" in columns:
            packing.check_mask_of_packed(example, columns["position_ids"], columns["attention_mask"])
            labels = labels.masked_fill(columns["position_ids"] == 0, IGNORED)
        for name in _COUNTING:
            if example.get(name) is not None:
                counted = vector(name, example[name])
                check_length(name, counted, len(labels))
                labels = labels.masked_fill(counted == 0, IGNORED)
        if example.get("prompt_length") is not None:
            prompt = (columns["attention_mask"].cumsum(0) - 1) < number("prompt_length", example["prompt_length"])
            labels = labels.masked_fill(prompt, IGNORED)
        return {**columns, "labels": labels}


class MaskedLM(LanguageTask):
    """Prediction of masked tokens with a Hugging Face masked language model, such as BERT.

    Examples are dicts with `input_ids`, in which some tokens are masked, and `labels`, -100 everywhere else; optionally
    `attention_mask`. Which tokens are masked is part of the example, so it must not be drawn anew
    whenever the dataset is read.
    """

    needed_labels = "the masked tokens, and -100 for all others"

    def predictions(self, model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        logits: Tensor = model(**self.inputs(model, batch)).logits
        return logits, self.targets(model, batch)


class Seq2Seq(LanguageTask):
    """Next-token prediction with a Hugging Face encoder-decoder, such as T5 or BART.

    Examples are dicts with `input_ids` of the encoder and `labels`, the decoder's targets (-100 = not counted; at the
    end, -100 is padding); optionally `attention_mask` of the encoder. Without `decoder_input_ids`, the model makes the
    decoder's inputs of the labels.

    Layers see the encoder's tokens or the decoder's, and are told apart by how many there are: where both would be
    equally many, the decoder's have one more of padding. Token scores are of the encoder's tokens; track only its
    layers for them.
    """

    as_long_as: ClassVar[Mapping[str, str]] = dict.fromkeys(_DECODED, "labels")
    needed_labels = "the tokens that the decoder is to write"
    padding: ClassVar[Mapping[str, int]] = {**LanguageTask.padding, "decoder_input_ids": 0, "decoder_attention_mask": 0}

    def predictions(self, model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        logits: Tensor = model(**self.inputs(model, batch), labels=batch["labels"], use_cache=False).logits
        return logits, self.targets(model, batch)

    def targets(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        labels: Tensor = batch["labels"]
        return labels

    def masks(self, batch: TokenBatch) -> tuple[Tensor, ...]:
        """The encoder's mask and the decoder's."""
        encoder = self.mask(batch)
        assert encoder is not None
        counted = batch["labels"] != IGNORED
        return encoder, counted.flip(1).cummax(1).values.flip(1)  # real: up to the last that is counted

    def collate(self, examples: Sequence[object]) -> TokenBatch:
        batch = super().collate(examples)
        if batch["labels"].shape[1] == batch["input_ids"].shape[1]:
            for name in batch.keys() & _DECODED:
                batch[name] = functional.pad(batch[name], (0, 1), value=self.padding[name])
        return batch

    def columns(self, example: object) -> TokenBatch:
        columns = super().columns(example)
        if not len(columns["labels"]):
            raise InputError("'labels' is empty: expected at least one token for the decoder. Leave the example out.")
        return columns


def summed_loss(logits: Tensor, labels: Tensor, sampler: Sampler | None) -> Tensor:
    """Cross-entropy of logits [..., classes] and labels [...], or of labels drawn for the counted ones: a scalar."""
    if sampler is not None:
        return drawn_cross_entropy(logits, labels != IGNORED, sampler)
    return summed_cross_entropy(logits, labels)


def of_real_tokens(labels: Tensor, batch: TokenBatch) -> Tensor:
    """Labels [batch, tokens] without those that are predicted from padding, such as the first token's behind it."""
    mask = batch.get("attention_mask")
    return labels if mask is None else labels.masked_fill(mask == 0, IGNORED)


def _labels(batch: TokenBatch) -> Tensor:
    return batch["labels"] if "labels" in batch else of_real_tokens(batch["input_ids"], batch)


def _token_positions(mask: Tensor, position: int) -> Tensor:
    """Where the real token number `position` of each example in `mask` [batch, tokens] is: int64 [batch]."""
    number = mask.cumsum(1)  # 1 at the first real token
    wanted = position + (1 if position >= 0 else number[:, -1:] + 1)
    found = mask & (number == wanted)
    if not bool(found.any(1).all()):
        raise InputError(
            f"measure: position={position} of a query with {int(number[~found.any(1), -1][0])} tokens; expected a "
            "position that every query has, counted from its first (0) or its last token (-1)."
        )
    return found.int().argmax(1)
