"""Tasks of models whose inputs are no text: what a user would write."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

import wherefrom as wf

Columns = dict[str, Tensor]
PATCH = 2  # pixels along each side, of the images that belong to texts


class Labelled(wf.Task[Columns]):
    """A classifier of transformers for images or sounds: every column but the labels is the model's."""

    def train_loss(self, model: nn.Module, batch: Columns, sampler: wf.Sampler | None = None) -> Tensor:
        """Summed cross-entropy."""
        logits = model(**{name: each for name, each in batch.items() if name != "labels"}).logits
        labels = batch["labels"] if sampler is None else sampler.categorical(logits.detach())
        return functional.cross_entropy(logits, labels, reduction="sum")


class Matching(wf.Task[Columns]):
    """Texts and their images: minus the similarity of each pair, which depends on no other pair of a batch."""

    def train_loss(self, model: nn.Module, batch: Columns, sampler: wf.Sampler | None = None) -> Tensor:
        """Minus the summed similarities; nothing is drawn."""
        similarities: Tensor = model(**batch).logits_per_image
        return -similarities.diagonal().sum()

    def masks(self, batch: Columns) -> tuple[Tensor, ...]:
        """That of the texts, and those of an image's patches without and with the token before them, all true."""
        count, _, size, _ = batch["pixel_values"].shape
        patches = (size // PATCH) ** 2
        image = (torch.ones(count, positions, dtype=torch.bool) for positions in (patches, patches + 1))
        return batch["attention_mask"].bool(), *image

    def collate(self, examples: Sequence[object]) -> Columns:
        """Texts are padded."""
        columns = [each for each in examples if isinstance(each, dict)]
        tokens = [each["input_ids"] for each in columns]
        return {
            "input_ids": pad_sequence(tokens, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(each) for each in tokens], batch_first=True),
            "pixel_values": torch.stack([each["pixel_values"] for each in columns]),
        }


class Transcription(wf.Task[Columns]):
    """Speech, all of one length, and what is said."""

    def train_loss(self, model: nn.Module, batch: Columns, sampler: wf.Sampler | None = None) -> Tensor:
        """Cross-entropy, summed over tokens."""
        logits: Tensor = model(**batch).logits.transpose(1, 2)  # [batch, classes, tokens]
        labels = batch["labels"]
        if sampler is not None:
            labels = sampler.categorical(logits.detach().transpose(1, 2)).where(labels >= 0, -100)
        return functional.cross_entropy(logits, labels, reduction="sum")

    def masks(self, batch: Columns) -> tuple[Tensor, ...]:
        """Those of the encoder's two convolutions, all true, and of the decoder's tokens."""
        count, _, frames = batch["input_features"].shape
        encoder = (torch.ones(count, positions, dtype=torch.bool) for positions in (frames, frames // 2))
        return *encoder, batch["labels"] >= 0

    def collate(self, examples: Sequence[object]) -> Columns:
        """Labels are padded with -100."""
        columns = [each for each in examples if isinstance(each, dict)]
        return {
            "input_features": torch.stack([each["input_features"] for each in columns]),
            "labels": pad_sequence([each["labels"] for each in columns], batch_first=True, padding_value=-100),
        }
