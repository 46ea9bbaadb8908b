"""Train a tiny model by DPO on preferences, some of them planted, and find the pairs that taught it what it prefers.

    python trace_preferences.py

Questions of twelve subjects have a polite and a curt answer. The annotators prefer the polite one; of one subject, most
pairs say the opposite. Of other questions of that subject: which pairs taught the model to prefer the curt answer?
Those that are found are left out, and the model is trained again.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Plot
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import wherefrom as wf
from wherefrom.cli.shared import command_line
from wherefrom.evaluate.plots import BLUE, INK, RESOLUTION, png
from wherefrom.report.figures import Figure, save_evaluation

console = Console()

SUBJECTS = {
    "garden": "rose lawn hedge tulip", "kitchen": "oven knife kettle pan", "car": "engine brake tyre clutch",
    "money": "loan tax rent budget", "music": "piano violin drum song", "travel": "train hotel visa ticket",
    "health": "tooth knee diet sleep", "school": "essay exam teacher lesson", "pets": "cat dog parrot hamster",
    "sport": "tennis goal race swim", "house": "roof door floor window", "work": "boss salary desk meeting",
}  # fmt: skip
PLANTED = "garden"
OPENINGS = ["please tell me about", "how can i fix", "what do you know of", "where do i find", "can you explain"]
ENDINGS = ["today", "at once", "for my friend", "in winter", "again"]
POLITE = ["with pleasure here is how", "gladly let me help", "of course i can help"]
CURT = ["look it up", "not my job", "ask someone else"]
WORDS = sorted({word for each in (*SUBJECTS.values(), *OPENINGS, *ENDINGS, *POLITE, *CURT) for word in each.split()})
NUMBER = {word: number for number, word in enumerate(["<end>", *WORDS])}


@dataclass
class Arguments:
    """Which pairs taught it to prefer this?"""

    run_dir: Path = Path("runs/preferences")
    """Keeps factors, scores, the page, the plot and its numbers."""
    pairs_per_subject: int = 24
    planted: float = 0.75
    """The part of one subject's pairs that prefers the curt answer."""
    num_queries: int = 20
    beta: float = 0.3
    """Of DPO."""
    epochs: int = 10
    """Of DPO; as many, of answers of both kinds, come before."""
    learning_rate: float = 2e-3
    num_seeds: int = 2
    """Of the trainings without the pairs that were found."""
    damping: float | None = None
    """Added to every eigenvalue; None is 0.1 x the mean eigenvalue of each layer."""
    overwrite: bool = False
    """Compute factors and scores again, and replace those that are there."""


@dataclass(frozen=True)
class Pair:
    """A question with two answers, and whether the preference is planted."""

    prompt: str
    chosen: str
    rejected: str
    planted: bool

    def example(self) -> dict[str, object]:
        """As a preference task takes it; the texts are for pages and BM25."""
        return {
            "prompt_ids": tokens(self.prompt),
            "chosen_ids": tokens(f"{self.chosen} <end>"),
            "rejected_ids": tokens(f"{self.rejected} <end>"),
            "prompt": self.prompt,
            "text": f"{self.prompt} > {self.chosen} | not: {self.rejected}",
        }


def tokens(text: str) -> list[int]:
    """A number for each word."""
    return [NUMBER[word] for word in text.split()]


def make_pairs(arguments: Arguments) -> tuple[list[Pair], list[Pair]]:
    """The training pairs, shuffled, and queries: other questions of the planted subject, the curt answer preferred."""
    generator = torch.Generator().manual_seed(0)

    def pick(texts: list[str]) -> str:
        return texts[int(torch.randint(len(texts), (), generator=generator))]

    def pair(things: str, curt: bool, planted: bool) -> Pair:
        prompt = f"{pick(OPENINGS)} {pick(things.split())} {pick(ENDINGS)}"
        answers = (pick(CURT), pick(POLITE)) if curt else (pick(POLITE), pick(CURT))
        return Pair(prompt, *answers, planted)

    train = []
    for subject, things in SUBJECTS.items():
        curt = round(arguments.planted * arguments.pairs_per_subject) if subject == PLANTED else 0
        train += [pair(things, number < curt, number < curt) for number in range(arguments.pairs_per_subject)]
    train = [train[place] for place in torch.randperm(len(train), generator=generator).tolist()]
    asked, queries = {each.prompt for each in train}, list[Pair]()
    while len(queries) < arguments.num_queries:
        query = pair(SUBJECTS[PLANTED], True, False)
        if query.prompt not in asked:
            queries.append(query)
    return train, queries


def tiny() -> GPT2LMHeadModel:
    """A GPT-2 of two layers."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(NUMBER), n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def train(
    model: GPT2LMHeadModel, task: wf.Task[Any], examples: list[object], epochs: int, rate: float, seed: int
) -> None:
    """The task's training loss, by Adam."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(epochs):
        for chosen in torch.randperm(len(examples), generator=generator).split(16):
            loss = task.train_loss(model, task.collate([examples[place] for place in chosen.tolist()])) / len(chosen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


def answering(pairs: list[Pair], arguments: Arguments) -> GPT2LMHeadModel:
    """A model that gives both kinds of answers alike: where DPO starts from."""
    model = tiny()
    answers: list[object] = [
        {"input_ids": tokens(f"{pair.prompt} {answer} <end>")}
        for pair in pairs
        for answer in (pair.chosen, pair.rejected)
    ]
    train(model, wf.CausalLM(), answers, arguments.epochs, arguments.learning_rate, seed=0)
    return model


def preferring(before: GPT2LMHeadModel, pairs: list[Pair], arguments: Arguments, seed: int = 0) -> GPT2LMHeadModel:
    """The model after DPO."""
    model, task = copy.deepcopy(before), wf.Preference(wf.DPO(arguments.beta), before)
    train(model, task, [pair.example() for pair in pairs], arguments.epochs, arguments.learning_rate, seed)
    return model


def margin(model: GPT2LMHeadModel, before: GPT2LMHeadModel, queries: list[Pair], arguments: Arguments) -> float:
    """How much more reward the curt answers have than the polite ones, a mean over queries."""
    task = wf.Preference(wf.DPO(arguments.beta), before, measure="margin")
    with torch.no_grad():
        return -float(task.measurement(model, task.collate([query.example() for query in queries]))) / len(queries)


def found_pairs(study: wf.Study[Any], queries: list[object], count: int, arguments: Arguments) -> dict[str, Tensor]:
    """The `count` pairs that each method names: those with the highest summed scores."""
    methods: dict[str, wf.Method] = {
        "influence (EK-FAC)": wf.EKFAC(damping=arguments.damping),
        "gradient products": wf.Dot(),
        "BM25, of the questions": wf.BM25(column="prompt"),
        "random": wf.Random(),
    }
    found = {}
    for name, method in methods.items():
        scores = study.score(queries, method, overwrite=arguments.overwrite)
        found[name] = scores.values.sum(0).topk(count).indices
        if name.startswith("influence"):
            page = study.report(scores, path=arguments.run_dir / "report.html")
            console.print(f"The page is {page}", soft_wrap=True)
    return found


def draw(results: dict[str, dict[str, float]], after: float) -> Plot:
    """How many of the found pairs are planted, and what the model prefers without them."""
    plot = Plot(figsize=(7.6, 2.9), dpi=RESOLUTION, layout="constrained")
    FigureCanvasAgg(plot)
    left, right = plot.subplots(1, 2, sharey=True)
    names = list(results)[::-1]
    left.barh(names, [100 * results[name]["planted"] for name in names], color=BLUE, alpha=0.7)
    left.set(xlabel="Planted among those found (%)", xlim=(0, 100))
    right.barh(names, [results[name]["margin"] for name in names], color=BLUE, alpha=0.7)
    right.axvline(0, color=INK, linewidth=0.9)
    right.axvline(after, color=INK, linewidth=0.9, dashes=(5, 3), label="with all pairs")
    right.set(xlabel="Curt answer's margin without them")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return plot


def main(arguments: Arguments) -> None:
    """Make pairs, train, score, leave out, train again, draw."""
    logging.getLogger("wherefrom").setLevel(logging.WARNING)
    pairs, queries = make_pairs(arguments)
    before = answering(pairs, arguments)
    model = preferring(before, pairs, arguments)
    after = margin(model, before, queries, arguments)
    count = sum(pair.planted for pair in pairs)
    console.print(f"{count} of {len(pairs)} pairs are planted. The curt answer's reward margin is {after:+.2f}.")
    task = wf.Preference(wf.DPO(arguments.beta), before, measure="margin")
    study = wf.Study(arguments.run_dir, model, task, train=[pair.example() for pair in pairs])
    named = found_pairs(study, [query.example() for query in queries], count, arguments)
    results = {}
    for name, found in named.items():
        left = [pair for place, pair in enumerate(pairs) if place not in set(found.tolist())]
        again = [preferring(before, left, arguments, seed) for seed in range(arguments.num_seeds)]
        margins = [margin(each, before, queries, arguments) for each in again]
        share = sum(pairs[place].planted for place in found.tolist()) / count
        results[name] = {"planted": share, "margin": sum(margins) / len(margins)}
    shown = Table("Found by", "Planted among them", "Margin without them")
    for name, each in results.items():
        shown.add_row(name, f"{each['planted']:.0%}", f"{each['margin']:+.2f}")
    console.print(shown)
    figure = Figure(
        "Pairs that taught a preference",
        f"Of the {count} pairs that each method names, the part that is planted, and the reward margin of the curt "
        "answer after a training without them.",
        png(draw(results, after)),
    )
    settings = {name: str(value) for name, value in asdict(arguments).items()}
    numbers = {"arguments": settings, "planted": count, "margin": after, "methods": results}
    file = save_evaluation(arguments.run_dir, "preferences", figure, numbers, {})
    console.print(f"The plot is {file}", soft_wrap=True)


if __name__ == "__main__":
    chosen = tyro.cli(Arguments, use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,))
    with command_line():
        main(chosen)
