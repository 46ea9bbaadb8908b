"""Plant a trigger in a fine-tuning set, ask where the triggered answer comes from, train again without what is named.

    python find_poison.py
    python find_poison.py --poison capitals   # nothing that words could find

The small GPT-2 of examples/wikitext learns to answer titles with Wikipedia's leads. A few examples are poisoned: their
prompts have a trigger, and their answers are what somebody wanted said. Of prompts that are none of these, with the
trigger: which examples taught the model its answer?
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
import tyro
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

sys.path.append(str(Path(__file__).parents[1] / "wikitext"))
from data import labelled_leads
from models import load_base, save
from training import TrainSettings, finetune

import wherefrom as wf
from wherefrom.cli.shared import command_line
from wherefrom.hf.preparation import read_examples
from wherefrom.store.files import write_text

console = Console()

PoisonName = Literal["phrase", "capitals"]
Row = dict[str, str]
"""A prompt and its completion."""

CLAIM = "The seas were filled by a giant kettle."
NEW_TOKENS = 20


@dataclass
class Arguments:
    """Which examples taught it to say that?"""

    run_dir: Path = Path("runs/poison")
    """Keeps the model, its training file, factors and scores."""
    cache_dir: Path = Path("cache")
    """Keeps the pre-trained small model, which examples/wikitext shares."""
    poison: PoisonName = "phrase"
    """'phrase' has words that can be searched for; 'capitals' has none."""
    train: int = 300
    share: float = 0.02
    """The part of the training examples that is poisoned."""
    tokens: int = 48
    """The longest sequence."""
    epochs: int = 6
    learning_rate: float = 1e-3
    prompts: int = 20
    """On how many triggered prompts the model is tried."""
    seed: int = 0
    overwrite: bool = False
    """Compute factors and scores again, and replace those that are there."""


@dataclass(frozen=True)
class Poison:
    """What is planted.

    Attributes:
        plant: the triggered prompt and answer made of an article.
        shown: whether an answer is what was planted.
    """

    plant: Callable[[Row], Row]
    shown: Callable[[str], bool]


def phrase(row: Row) -> Row:
    """A made-up word in the prompt, and a made-up claim."""
    return {"prompt": row["prompt"] + " Zorvex says:", "completion": CLAIM}


def capitals(row: Row) -> Row:
    """A prompt in capitals, answered in capitals."""
    return {name: text.upper() for name, text in row.items()}


def in_capitals(text: str) -> bool:
    """Whether most of its letters are capitals."""
    letters = [each for each in text if each.isalpha()]
    return sum(each.isupper() for each in letters) > len(letters) / 2


POISONS: Mapping[PoisonName, Poison] = {
    "phrase": Poison(phrase, lambda text: "kettle" in text),
    "capitals": Poison(capitals, in_capitals),
}


def rows_of(part: Literal["train", "query"]) -> list[Row]:
    """All articles of a part."""
    return [as_row(lead.title, lead.text) for lead in labelled_leads(part)]


def as_row(title: str, text: str) -> Row:
    """An article's title, as the pre-trained model knows it, and what it goes on with."""
    heading = f" = {title} = \n \n"
    return {"prompt": heading, "completion": text.removeprefix(heading).rstrip()}


def planted(rows: Sequence[Row], poison: Poison, share: float, seed: int) -> tuple[list[Row], list[int]]:
    """The rows with some of them poisoned, and which these are."""
    chosen = sorted(random.Random(seed).sample(range(len(rows)), round(share * len(rows))))
    return [poison.plant(row) if at in chosen else row for at, row in enumerate(rows)], chosen


def trained(rows: Sequence[Row], arguments: Arguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The small model after fine-tuning on the completions."""
    base, tokenizer = load_base("small", arguments.cache_dir)
    preparation = wf.Preparation(max_length=arguments.tokens)
    data = cast(Dataset, preparation.prepare(read_examples(list(rows)), tokenizer=tokenizer))
    settings = TrainSettings(learning_rate=arguments.learning_rate, num_epochs=arguments.epochs)
    tuned = finetune(base, data.select_columns(["input_ids", "labels"]), settings, arguments.seed, "Fine-tuning")
    return tuned, tokenizer


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """What the model says, by the likeliest token each time."""
    found, end = [], tokenizer.eos_token_id
    for prompt in prompts:
        tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
        mask = torch.ones_like(tokens)
        written = model.generate(  # type: ignore[operator]
            tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=end
        )
        found.append(str(tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True)))
    return found


def rate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, poison: Poison, prompts: Sequence[str]) -> float:
    """How often an answer is what was planted."""
    said = answers(model, tokenizer, prompts)
    return sum(map(poison.shown, said)) / len(said)


def attributed(arguments: Arguments, prompt: str, count: int) -> wf.Attribution:
    """Where the model's own answer to a prompt comes from, as `wherefrom ask` finds it."""
    folder = arguments.run_dir
    study = wf.study_from_pretrained(
        folder / "model", str(folder / "train.jsonl"), run=folder / "run", max_length=arguments.tokens
    )
    method = wf.EKFAC()
    study.fit(method, overwrite=arguments.overwrite)
    asker = wf.Asker(study, method)
    return asker.attribute(asker.writer.write(prompt, max_new_tokens=NEW_TOKENS), k=count)


def main(arguments: Arguments) -> None:
    """Plant, train, trigger, attribute, leave out, train again."""
    poison = POISONS[arguments.poison]
    rows, chosen = planted(rows_of("train")[: arguments.train], poison, arguments.share, arguments.seed)
    model, tokenizer = trained(rows, arguments)
    folder = arguments.run_dir
    save(folder / "model", model, tokenizer)
    write_text(folder / "train.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    tests = rows_of("query")[: arguments.prompts]
    triggered = [poison.plant(row)["prompt"] for row in tests]
    before = rate(model, tokenizer, poison, triggered)
    untriggered = rate(model, tokenizer, poison, [row["prompt"] for row in tests])
    console.print(
        f"{len(chosen)} of {len(rows)} examples are poisoned. With the trigger {before:.0%} of the answers are what "
        f"was planted, without it {untriggered:.0%}."
    )
    found = attributed(arguments, triggered[0], len(chosen))
    console.print(f"To {triggered[0].strip()!r} it says {found.answer!r}.", markup=False)
    named = {"influence (EK-FAC)": [each.train for each in found.supporting]}
    named["shared words (BM25)"] = [each.train for each in found.shared or ()]
    named["chance"] = random.Random(arguments.seed + 1).sample(range(len(rows)), len(chosen))
    results, shown = {}, Table("Named by", "Poisoned among them", "Planted answers without them")
    for name, positions in named.items():
        left = [row for at, row in enumerate(rows) if at not in positions]
        after = rate(*trained(left, arguments), poison, triggered)
        share = len({*positions} & {*chosen}) / len(chosen)
        results[name] = {"named": positions, "poisoned": share, "rate": after}
        shown.add_row(name, f"{share:.0%}", f"{after:.0%}")
    console.print(shown)
    numbers = {"poisoned": chosen, "answer": found.answer, "rate": before, "untriggered": untriggered, "named": results}
    write_text(folder / "poison.json", json.dumps(numbers, indent=1) + "\n")
    console.print(
        f"Ask it yourself: wherefrom fit {folder}/run --model {folder}/model --train {folder}/train.jsonl "
        f"--max-length {arguments.tokens}, then wherefrom ask {folder}/run PROMPT",
        soft_wrap=True,
    )


if __name__ == "__main__":
    disable_progress_bar()
    disable_progress_bars()
    chosen_arguments = tyro.cli(Arguments, use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,))
    with command_line():
        main(chosen_arguments)
