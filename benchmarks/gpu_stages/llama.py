"""A Llama of the shape of a 0.5B model, at sizes for which other libraries have published times.

On an H200, dattri-llm has published 12.8 s at rank 64 for 64 training sequences of 512 tokens and one query, and
84.7 s for kronfluence.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from workload import synchronize

import wherefrom as wf
from gpu_stages.job import execution
from gpu_stages.micro import tf32_products
from gpu_stages.report import Figures, Report, Setting


def llama(report: Report, setting: Setting) -> None:
    """EK-FAC and projected gradients (LoGra), of few and of many examples."""
    tokens, vocabulary = (16, 211) if setting.rehearse else (512, 151936)
    few, many = ((8, 1), (12, 4)) if setting.rehearse else ((64, 1), (1000, 100))
    model = _model(setting, tokens, vocabulary).to(setting.device)  # type: ignore[arg-type]
    warm = partial(_logra, model, setting, vocabulary, tokens, 8, 1)
    report.measure("warm-up", warm)
    for train, queries in (few, many):
        report.measure(
            f"LoGra, {train} x {queries}", partial(_logra, model, setting, vocabulary, tokens, train, queries)
        )
    report.measure(f"EK-FAC, {few[0]} x {few[1]}", partial(_ekfac, model, setting, vocabulary, tokens, *few))
    report.measure(f"EK-FAC, {many[0]} x {many[1]}", partial(_ekfac, model, setting, vocabulary, tokens, *many))


def _model(setting: Setting, tokens: int, vocabulary: int) -> LlamaForCausalLM:
    """24 blocks of width 896, 14 heads on 2, as the 0.5B models have; random weights."""
    torch.manual_seed(0)
    width, inner, blocks, heads = (32, 48, 1, 4) if setting.rehearse else (896, 4864, 24, 14)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=2, max_position_embeddings=tokens, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.eval()
    return model


def _sequences(count: int, vocabulary: int, tokens: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": row} for row in torch.randint(vocabulary, (count, tokens), generator=generator)]


def _study(
    folder: str, model: LlamaForCausalLM, setting: Setting, train: list[dict[str, Tensor]], half: bool = False
) -> wf.Study[dict[str, Tensor]]:
    return wf.Study(folder, model, wf.CausalLM(), train=train, execution=execution(setting, half))


def _logra(
    model: LlamaForCausalLM, setting: Setting, vocabulary: int, tokens: int, train: int, queries: int
) -> Figures:
    """Scores from projected gradients of rank 64, in TF32."""
    rank = 4 if setting.rehearse else 64
    rows, queried = (_sequences(count, vocabulary, tokens, seed) for count, seed in ((train, 1), (queries, 2)))
    with tempfile.TemporaryDirectory(dir=setting.scratch) as folder, tf32_products(True):
        study = _study(folder, model, setting, rows)
        start = time.perf_counter()
        scores = study.score(queried, wf.LoGra(rank=rank))
        synchronize()
        return {"rank": rank, "seconds": time.perf_counter() - start, "finite": bool(scores.values.isfinite().all())}


def _ekfac(
    model: LlamaForCausalLM, setting: Setting, vocabulary: int, tokens: int, train: int, queries: int
) -> Figures:
    """Whole gradients and EK-FAC factors of all blocks."""
    rows, queried = (_sequences(count, vocabulary, tokens, seed) for count, seed in ((train, 1), (queries, 2)))
    with tempfile.TemporaryDirectory(dir=setting.scratch) as folder, tf32_products(not setting.half):
        study = _study(folder, model, setting, rows, setting.half)
        start = time.perf_counter()
        factors = study.fit(wf.EKFAC())
        fitted = time.perf_counter()
        scores = study.score(queried, wf.EKFAC(factors=factors))
        return {
            "fit_seconds": fitted - start,
            "score_seconds": time.perf_counter() - fitted,
            "seconds": time.perf_counter() - start,
            "finite": bool(scores.values.isfinite().all()),
            "actions": study.profile.text(),
        }
