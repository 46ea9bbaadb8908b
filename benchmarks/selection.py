"""What fine-tuning on the examples that `wherefrom.select` chooses is worth, against BM25, chance and a topic's own.

    python benchmarks/selection.py

The small pre-trained GPT-2 and Wikipedia's leads, a pool that is chosen from; for each of some topics, a few texts are
the targets, and the loss is measured on others of the topic. In a second pool, the words of every third text are
shuffled: the right words, and nothing to learn from. Written to `results/selection.json`.
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import tyro
from datasets import Dataset, disable_progress_bars
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar
from workload import ROOT, save_results

import wherefrom as wf
from wherefrom.jobs.selecting import Normalized

sys.path.append(str(ROOT / "examples" / "wikitext"))

from data import Article, labelled_leads, sequences
from models import LEARNING_RATES, load_base
from training import TrainSettings, finetune, measured_losses

METHODS: Mapping[str, tuple[wf.Method, Normalized]] = {
    "ekfac": (wf.EKFAC(), "none"),
    "bm25": (wf.BM25(), "none"),
    "ekfac, targets": (wf.EKFAC(), "targets"),
    "ekfac, examples": (wf.EKFAC(), "examples"),
}
# Where every third text is shuffled, the first two.
SHUFFLED_METHODS = ("ekfac", "bm25")


@dataclass(frozen=True)
class Arguments:
    """Models that are fine-tuned on selections."""

    topics: tuple[str, ...] = (
        "People", "Biology and health sciences", "Physical sciences", "Society and social sciences",
    )  # fmt: skip
    pool: int = 1000
    """Texts that are chosen from."""
    n: int = 100
    """Examples that are chosen."""
    seeds: int = 3
    targets: int = 16
    """Texts of each topic that are selected for."""
    measured: int = 32
    """Other texts of the topic, whose loss is measured."""
    tokens: int = 64
    """The longest sequence."""


@dataclass(frozen=True)
class Texts:
    """What is chosen from, what for, and what is measured.

    Attributes:
        pool: examples with the column `label`, their topic.
        shuffled: positions in it of texts whose words are in random order.
        targets, measured: by topic.
    """

    pool: Dataset
    shuffled: set[int]
    targets: dict[str, Dataset]
    measured: dict[str, Dataset]

    @classmethod
    def read(cls, arguments: Arguments, tokenizer: PreTrainedTokenizerBase, shuffled: bool) -> Texts:
        """All leads that pre-training has not seen."""
        leads, last = [*labelled_leads("train"), *labelled_leads("query")], arguments.targets + arguments.measured
        of_topics = {topic: [each for each in leads if each.topic == topic][-last:] for topic in arguments.topics}
        aside = {each.title for of_topic in of_topics.values() for each in of_topic}
        pool = [each for each in leads if each.title not in aside][: arguments.pool]
        spoilt = set(range(0, len(pool), 3)) if shuffled else set()
        pool = [_shuffled(each) if position in spoilt else each for position, each in enumerate(pool)]

        def made(some: list[Article]) -> Dataset:
            return sequences(some, tokenizer, arguments.tokens)

        targets = {topic: made(each[: arguments.targets]) for topic, each in of_topics.items()}
        measured = {topic: made(each[arguments.targets :]) for topic, each in of_topics.items()}
        return cls(made(pool), spoilt, targets, measured)


def _shuffled(lead: Article) -> Article:
    words = lead.text.split()
    random.Random(lead.title).shuffle(words)
    return replace(lead, text=" ".join(words))


@dataclass(frozen=True)
class Selected:
    """Examples to train on, and how often each is seen."""

    positions: Sequence[int]
    epochs: int = 3


def selections(arguments: Arguments, texts: Texts, study: wf.Study[Any]) -> Iterator[tuple[str, str, Selected]]:
    """Topic, name, and what it chooses; by chance it is the same for all topics, and each seed has another one."""
    for topic, targets in texts.targets.items():
        for name in SHUFFLED_METHODS if texts.shuffled else METHODS:
            method, normalized = METHODS[name]
            found = wf.select(study, targets, arguments.n, method, normalized=normalized)
            yield topic, name, Selected(found.chosen.tolist())
        own = [position for position, label in enumerate(texts.pool["label"]) if label == topic]
        others = [each for each in by_chance(len(texts.pool), 0) if each not in set(own)]
        yield topic, "the topic's own", Selected([*own, *others][: arguments.n])


def by_chance(count: int, seed: int) -> list[int]:
    """All positions in a random order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass(frozen=True)
class Losses:
    """Fine-tunes the pre-trained model, and measures."""

    arguments: Arguments
    texts: Texts
    base: PreTrainedModel

    def after(self, selected: Selected, seed: int, topics: Sequence[str]) -> dict[str, Tensor]:
        """Each measured text's loss in nats a token, [texts], by topic."""
        some = self.texts.pool.select(sorted(selected.positions))
        tuned = finetune(self.base, some, settings(selected.epochs), seed)
        return {topic: self.of(tuned, topic) for topic in topics}

    def of(self, model: PreTrainedModel, topic: str) -> Tensor:
        """The same of a model."""
        texts = self.texts.measured[topic]
        return measured_losses(model, texts) / torch.tensor([len(each) - 1 for each in texts["input_ids"]])


def settings(epochs: int) -> TrainSettings:
    """Of every fine-tuning."""
    return TrainSettings(batch_size=10, learning_rate=LEARNING_RATES["small"], weight_decay=0.01, num_epochs=epochs)


def measured(arguments: Arguments, shuffled: bool) -> dict[str, object]:
    """Everything about one pool."""
    base, tokenizer = load_base("small", ROOT / "cache")
    texts = Texts.read(arguments, tokenizer, shuffled)
    losses, pool, topics, seeds = Losses(arguments, texts, base), texts.pool, arguments.topics, range(arguments.seeds)
    scored = finetune(base, pool, settings(1), 0)
    with tempfile.TemporaryDirectory() as folder:
        study = wf.Study(folder, scored, wf.CausalLM(), train=pool, execution=wf.Execution(progress=False))
        chosen = list(selections(arguments, texts, study))
    after: dict[str, dict[str, Tensor]] = {}  # by name and topic, [seeds, texts]

    def add(name: str, found: list[dict[str, Tensor]]) -> None:
        for topic in found[0]:
            after.setdefault(name, {})[topic] = torch.stack([each[topic] for each in found])
            print(f"{name:16} {topic:28} {float(after[name][topic].mean()):.4f}", flush=True)

    add("before", [{topic: losses.of(base, topic) for topic in topics}])
    orders = [by_chance(len(pool), seed) for seed in seeds]
    add("random", [losses.after(Selected(orders[seed][: arguments.n]), seed, topics) for seed in seeds])
    whole = [Selected(orders[seed][: 3 * arguments.n], epochs=1) for seed in seeds]  # as many steps
    add("the whole pool", [losses.after(whole[seed], seed, topics) for seed in seeds])
    for topic, name, selected in chosen:
        add(name, [losses.after(selected, seed, [topic]) for seed in seeds])
    made_of: dict[str, dict[str, object]] = {}
    for topic, name, selected in chosen:
        made_of.setdefault(name, {})[topic] = described(texts, topic, selected.positions)
    table = {name: summary(after, name) | {"chosen": made_of.get(name, {})} for name in after}
    return {"pool": len(pool), "shuffled": len(texts.shuffled), "after": table}


def described(texts: Texts, topic: str, positions: Sequence[int]) -> dict[str, int]:
    """What a selection is made of."""
    labels, tokens = texts.pool["label"], texts.pool["input_ids"]
    return {
        "of the topic": sum(labels[each] == topic for each in positions),
        "shuffled": sum(each in texts.shuffled for each in positions),
        "tokens": sum(len(tokens[each]) for each in positions),
    }


def summary(after: Mapping[str, Mapping[str, Tensor]], name: str) -> dict[str, object]:
    """Means over texts and seeds, and differences with chance and BM25 with 95% intervals over texts."""
    found: dict[str, object] = {topic: float(each.mean()) for topic, each in after[name].items()}
    texts = torch.cat([each.mean(0) for each in after[name].values()])
    found["mean"] = float(texts.mean())
    for other in ("random", "bm25"):
        others = torch.cat([each.mean(0) for each in after[other].values()])
        if name not in (other, "before"):
            interval = stats.ttest_rel(texts.numpy(), others.numpy()).confidence_interval(0.95)
            found[f"less {other}"] = [float((texts - others).mean()), float(interval.low), float(interval.high)]
    return found


def main(arguments: Arguments) -> None:
    """Both pools."""
    logging.getLogger("wherefrom").setLevel(logging.WARNING)
    disable_progress_bar()
    disable_progress_bars()
    pools: dict[str, object] = {}
    for name in ("clean", "shuffled"):
        pools[name] = measured(arguments, name == "shuffled")
        save_results("selection", pools)


if __name__ == "__main__":
    main(tyro.cli(Arguments, use_underscores=True))
