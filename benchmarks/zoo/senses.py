"""Models of images, sounds, and of these with text, of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import wherefrom as wf
from zoo.examples import CLASSES, images, numbers, pairs, texts
from zoo.family import GROUPED, SIZES, Family, OfTransformers, Settings
from zoo.tasks import PATCH, Labelled, Matching, Transcription

_PATCHES: Settings = {
    "image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 12,
}  # fmt: skip
_STAGES: Settings = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]}
_LISTENER: Settings = {
    **SIZES, "conv_dim": [4, 4], "conv_kernel": [4, 3], "conv_stride": [4, 2], "num_feat_extract_layers": 2,
    "feat_extract_norm": "layer", "num_conv_pos_embeddings": 3, "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 4, "mask_time_prob": 0.0,
}  # fmt: skip
_SEEING: Settings = {**_PATCHES, "num_hidden_layers": 2}
_SIGLIP: Settings = {**_SEEING, "model_type": "siglip_vision_model", "vision_use_head": False}
_CLIP_TEXT: Settings = {**SIZES, "eos_token_id": 1}
_CLIP: Settings = {"vision_config": {**_PATCHES, "patch_size": PATCH}, "text_config": _CLIP_TEXT, "projection_dim": 6}
IMAGE = 3  # the token that stands for an image


def classifier(name: str, kind: str, settings: Settings, **more: Any) -> Family:
    """A classifier of images."""
    tiny = OfTransformers(kind, {"num_labels": CLASSES, **settings, **more})
    return Family(name, tiny, Labelled, images, OfTransformers(kind))


def listener(name: str, kind: str) -> Family:
    """A classifier of sounds of one length."""
    tiny = OfTransformers(kind, {"num_labels": CLASSES, **_LISTENER})
    return Family(
        name, tiny, Labelled, lambda: numbers("input_values", 48), OfTransformers(kind),
        note="the convolution of positions is under weight normalisation: its gradient is of what that gives",
    )  # fmt: skip


def reader(
    name: str,
    kind: str,
    vision: Settings,
    text: str,
    examples: Callable[[], list[object]] | None = None,
    **settings: Any,
) -> Family:
    """A causal language model that sees images.

    Args:
        text: the type of the model that reads and writes.
        examples: four tokens of an image before a text by default.
    """
    words = {**GROUPED, "model_type": text, "ffn_dim": 12, "word_embed_proj_dim": 8, "rope_parameters": {
        "rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4,
    }}  # fmt: skip
    image = {"image_token_id": IMAGE, "image_token_index": IMAGE}
    tiny = OfTransformers(kind, {"vision_config": vision, "text_config": words, **image, **settings})
    return Family(name, tiny, wf.CausalLM, examples or seen, OfTransformers(kind))


def captioned() -> list[object]:
    """Images with texts that end with token 1."""
    return [
        {"input_ids": torch.cat([text["input_ids"], torch.tensor([1])]), "pixel_values": image["pixel_values"]}
        for text, image in zip(texts(), images(), strict=True)
        if isinstance(text, dict) and isinstance(image, dict)
    ]


def seen() -> list[object]:
    """Texts with four tokens of an image before them."""
    return [
        {"input_ids": torch.cat([torch.full((4,), IMAGE), each["input_ids"]]), "pixel_values": each["pixel_values"]}
        for each in captioned()
        if isinstance(each, dict)
    ]


def prefixed() -> list[object]:
    """The same with what is to be written marked."""
    return [
        {**each, "token_type_ids": (each["input_ids"] != IMAGE).long()} for each in seen() if isinstance(each, dict)
    ]


def marked() -> list[object]:
    """The same with the image marked."""
    return [
        {**each, "token_type_ids": (each["input_ids"] == IMAGE).long()} for each in seen() if isinstance(each, dict)
    ]


def several() -> list[object]:
    """The same with several images, of which there is one."""
    return [{**each, "pixel_values": each["pixel_values"][None]} for each in seen() if isinstance(each, dict)]


def patched() -> list[object]:
    """The same with images as four patches of 12 numbers."""
    grid = torch.tensor([[1, 2, 2]])
    return [
        {
            **each,
            "pixel_values": each["pixel_values"].flatten()[:48].view(4, 12),
            "image_grid_thw": grid,
            "mm_token_type_ids": (each["input_ids"] == IMAGE).long(),
        }
        for each in seen()
        if isinstance(each, dict)
    ]


def spoken() -> list[object]:
    """Spectrograms [4, 16], and tokens."""
    return [
        {"input_features": sound["input_features"], "labels": pair["labels"]}
        for sound, pair in zip(numbers("input_features", 4, 16), pairs(), strict=True)
        if isinstance(sound, dict) and isinstance(pair, dict)
    ]


IMAGES = (
    classifier("ViT", "ViTForImageClassification", _PATCHES),
    classifier("DeiT", "DeiTForImageClassification", _PATCHES),
    classifier("BEiT", "BeitForImageClassification", _PATCHES),
    classifier("DINOv2", "Dinov2ForImageClassification", _PATCHES),
    classifier("Swin", "SwinForImageClassification", {}, image_size=8, patch_size=2, embed_dim=4, depths=[1, 1],
               num_heads=[1, 2], window_size=2),
    classifier("Swin v2", "Swinv2ForImageClassification", {}, image_size=8, patch_size=2, embed_dim=4, depths=[1, 1],
               num_heads=[1, 2], window_size=2),
    classifier("ConvNeXt", "ConvNextForImageClassification", {}, num_stages=2, hidden_sizes=[4, 8], depths=[1, 1],
               patch_size=2),
    classifier("ConvNeXt v2", "ConvNextV2ForImageClassification", {}, num_stages=2, hidden_sizes=[4, 8], depths=[1, 1],
               patch_size=2),
    classifier("ResNet", "ResNetForImageClassification", _STAGES),
    classifier("RegNet", "RegNetForImageClassification", _STAGES, groups_width=2),
    classifier("MobileNetV2", "MobileNetV2ForImageClassification", {}, image_size=32, depth_multiplier=0.1,
               depth_divisible_by=2, min_depth=2),
    classifier("SegFormer", "SegformerForImageClassification", {}, num_encoder_blocks=2, depths=[1, 1],
               sr_ratios=[2, 1], hidden_sizes=[4, 8], patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2],
               mlp_ratios=[2, 2]),
    classifier("CLIP, images", "CLIPForImageClassification", _CLIP),
    classifier("SigLIP, images", "SiglipForImageClassification", {"vision_config": _PATCHES}),
)  # fmt: skip

SOUNDS = (
    listener("Wav2Vec2", "Wav2Vec2ForSequenceClassification"),
    listener("HuBERT", "HubertForSequenceClassification"),
    listener("WavLM", "WavLMForSequenceClassification"),
    Family("Audio Spectrogram Transformer", OfTransformers("ASTForAudioClassification", {
        **_PATCHES, "num_labels": CLASSES, "max_length": 8, "num_mel_bins": 8, "frequency_stride": 4, "time_stride": 4,
    }), Labelled, lambda: numbers("input_values", 8, 8), OfTransformers("ASTForAudioClassification")),
    Family("Whisper", OfTransformers("WhisperForConditionalGeneration", {
        "vocab_size": 24, "num_mel_bins": 4, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12,
        "max_source_positions": 8, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }), Transcription, spoken, OfTransformers("WhisperForConditionalGeneration")),
)  # fmt: skip

TOGETHER = (
    Family("CLIP", OfTransformers("CLIPModel", _CLIP), Matching, captioned, OfTransformers("CLIPModel")),
    reader("LLaVA", "LlavaForConditionalGeneration", {**_SEEING, "model_type": "clip_vision_model"}, "llama"),
    reader("PaliGemma", "PaliGemmaForConditionalGeneration", _SIGLIP, "gemma", prefixed, projection_dim=8,
           hidden_size=8),
    reader("Gemma 3 with images", "Gemma3ForConditionalGeneration", _SIGLIP, "gemma3_text", marked,
           mm_tokens_per_image=4),
    reader("SmolVLM", "SmolVLMForConditionalGeneration", _SEEING, "llama", several, scale_factor=1),
    reader("BLIP-2", "Blip2ForConditionalGeneration", _SEEING, "opt", num_query_tokens=4, qformer_config={
        **SIZES, "encoder_hidden_size": 8,
    }),
    reader("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", {
        "depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 12, "patch_size": 2, "spatial_merge_size": 1,
        "temporal_patch_size": 1, "out_hidden_size": 8, "fullatt_block_indexes": [0], "window_size": 4,
    }, "qwen2_5_vl_text", patched),
)  # fmt: skip
