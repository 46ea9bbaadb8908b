"""A tiny GPT-2 where the examples keep their pre-trained small one, with a vocabulary of its own."""

from __future__ import annotations

from pathlib import Path

import data
import models
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


def cache_small_model(cache: Path, positions: int) -> None:
    """Write it into an example's cache; it takes sequences of `positions` tokens."""
    bpe = ByteLevelBPETokenizer()
    texts = [lead.text for lead in data.labelled_leads("query")[:20]]
    bpe.train_from_iterator(texts, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_positions=positions, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    models.save(models.small_folder(cache), GPT2LMHeadModel(config), tokenizer)
