"""Encoders and encoder-decoders of text, of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import wherefrom as wf
from zoo.examples import CLASSES, VOCABULARY, classified_texts, masked_texts, pairs, preferences, tagged_texts
from zoo.family import GROUPED, SIZES, Family, OfTransformers, Settings

_ENCODER: Settings = {**SIZES, "max_position_embeddings": 36, "type_vocab_size": 2}
_WRITER: Settings = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
_T5: Settings = {**_WRITER, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
_ESM: Settings = {
    "vocab_size": 33, "hidden_size": 1280, "num_hidden_layers": 33, "num_attention_heads": 20,
    "intermediate_size": 5120, "position_embedding_type": "rotary", "pad_token_id": 1,
}  # fmt: skip
_BART: Settings = {
    **_WRITER, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 32,
    "bos_token_id": 1, "forced_eos_token_id": 2,
}  # fmt: skip


def masked(name: str, kind: str, base: Settings = _ENCODER, large: Settings | None = None, **settings: Any) -> Family:
    """A masked language model."""
    usual = OfTransformers(kind, large or {})
    return Family(name, OfTransformers(kind, {**base, **settings}), wf.MaskedLM, masked_texts, usual)


def classifier(name: str, kind: str, base: Settings = _ENCODER, **settings: Any) -> Family:
    """A classifier of whole texts."""
    usual = OfTransformers(kind)
    tiny = OfTransformers(kind, {**base, "num_labels": CLASSES, **settings})
    return Family(name, tiny, wf.SequenceClassification, classified_texts, usual)


def tagger(name: str, kind: str) -> Family:
    """A classifier of tokens."""
    tiny = OfTransformers(kind, {**_ENCODER, "num_labels": CLASSES})
    return Family(name, tiny, wf.TokenClassification, tagged_texts, OfTransformers(kind))


def judge(name: str, kind: str, task: Callable[[], wf.Task[Any]], **settings: Any) -> Family:
    """A model that prefers one completion to another."""
    tiny, usual = OfTransformers(kind, {**GROUPED, **settings}), OfTransformers(kind, settings)
    return Family(name, tiny, task, preferences, usual)


def writer(name: str, kind: str, base: Settings, **settings: Any) -> Family:
    """An encoder-decoder."""
    usual = OfTransformers(kind)
    return Family(name, OfTransformers(kind, {**base, **settings}), wf.Seq2Seq, pairs, usual)


ENCODERS = (
    masked("BERT", "BertForMaskedLM"),
    masked("RoBERTa", "RobertaForMaskedLM"),
    masked("XLM-RoBERTa", "XLMRobertaForMaskedLM"),
    masked("DistilBERT", "DistilBertForMaskedLM", dim=8, n_layers=1, n_heads=2, hidden_dim=12),
    masked("ALBERT", "AlbertForMaskedLM", num_hidden_layers=3, embedding_size=6),
    masked("ELECTRA", "ElectraForMaskedLM", embedding_size=6),
    masked("DeBERTa v2, v3", "DebertaV2ForMaskedLM", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    masked("ModernBERT", "ModernBertForMaskedLM", num_hidden_layers=2, local_attention=4, global_attn_every_n_layers=2,
           sep_token_id=2, cls_token_id=1),
    masked("XLNet", "XLNetLMHeadModel", {}, vocab_size=24, d_model=8, n_layer=1, n_head=2, d_inner=12),
    masked("MPNet", "MPNetForMaskedLM"),
    replace(
        masked("ConvBERT", "ConvBertForMaskedLM", embedding_size=8, head_ratio=1, conv_kernel_size=3),
        examples=partial(masked_texts, (4, 4, 4, 4)),
        note="tried on texts of one length: its convolutions read padding, so its very losses depend on the batch",
    ),
    masked("Longformer", "LongformerForMaskedLM", attention_window=4),
    masked("BigBird", "BigBirdForMaskedLM", attention_type="original_full"),
    masked("RemBERT", "RemBertForMaskedLM", input_embedding_size=6, output_embedding_size=6),
    masked("EuroBERT", "EuroBertForMaskedLM", GROUPED),
    masked("NomicBERT", "NomicBertForMaskedLM"),
    masked("ESM-2", "EsmForMaskedLM", large=_ESM, position_embedding_type="rotary", mask_token_id=3,
           token_dropout=False),
)  # fmt: skip

HEADS = (
    classifier("BERT, classifier", "BertForSequenceClassification"),
    tagger("BERT, token classifier", "BertForTokenClassification"),
    classifier("GPT-2, classifier", "GPT2ForSequenceClassification", SIZES),
    classifier("Llama, classifier", "LlamaForSequenceClassification", GROUPED),
    judge("Llama, reward model", "LlamaForSequenceClassification", wf.RewardModel, num_labels=1),
    judge("Llama, DPO", "LlamaForCausalLM", wf.Preference),
)

WRITERS = (
    writer("T5", "T5ForConditionalGeneration", _T5),
    writer("Flan-T5, mT5", "MT5ForConditionalGeneration", _T5),
    writer("UMT5", "UMT5ForConditionalGeneration", _T5),
    writer("LongT5", "LongT5ForConditionalGeneration", _T5, local_radius=2),
    writer("Switch Transformer", "SwitchTransformersForConditionalGeneration", _T5, num_sparse_encoder_layers=1,
           num_sparse_decoder_layers=1, num_experts=2, num_decoder_layers=1, experts_implementation="eager"),
    writer("BART", "BartForConditionalGeneration", _BART),
    writer("mBART", "MBartForConditionalGeneration", _BART),
    writer("PLBart", "PLBartForConditionalGeneration", _BART),
    writer("Pegasus", "PegasusForConditionalGeneration", _BART),
    writer("Marian", "MarianMTModel", _BART),
    writer("Blenderbot", "BlenderbotForConditionalGeneration", _BART),
    writer("M2M-100, NLLB", "M2M100ForConditionalGeneration", _BART),
    writer("LED", "LEDForConditionalGeneration", _BART, attention_window=4, max_encoder_position_embeddings=32,
           max_decoder_position_embeddings=32),
    writer("ProphetNet", "ProphetNetForConditionalGeneration", _WRITER, hidden_size=8, num_encoder_layers=1,
           num_decoder_layers=1, num_encoder_attention_heads=2, num_decoder_attention_heads=2, encoder_ffn_dim=12,
           decoder_ffn_dim=12, max_position_embeddings=32, ngram=1),
)  # fmt: skip
