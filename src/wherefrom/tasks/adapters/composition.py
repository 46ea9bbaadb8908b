"""What the modules of a model are for: adapters, trained beside weights that were not, and what sees no text.

It knows how peft and transformers compose models; it does not know what a layer is, or which are tracked.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn
from typing_extensions import TypeIs


@dataclass(frozen=True)
class Adapters:
    """The adapters that peft has put into a model.

    Attributes:
        kinds: peft's names of them, such as LORA.
        modules: whose weights are theirs.
        copies: of these, the ones that stand for the model's own, which were trained as a whole (`modules_to_save`).
    """

    kinds: tuple[str, ...]
    modules: frozenset[nn.Module]
    copies: frozenset[nn.Module]


def adapters_of(model: nn.Module) -> Adapters | None:
    """What of a model are adapters; None of one that has none."""
    own, copies = set(_prompts(model)), set[nn.Module]()
    module: Any
    for module in model.modules():
        found = copies if type(module).__name__ == "ModulesToSaveWrapper" else own
        for name in getattr(module, "adapter_layer_names", ()):
            part = attrgetter(name)(module) if hasattr(module, name.partition(".")[0]) else None
            of_active = [part[each] for each in module.active_adapters if each in part] if _by_adapter(part) else [part]
            found.update(inner for each in of_active if isinstance(each, nn.Module) for inner in each.modules())
    configs = getattr(model, "peft_config", {}).values()
    kinds = dict.fromkeys(str(getattr(each.peft_type, "value", each.peft_type)) for each in configs)
    return Adapters(tuple(kinds), frozenset(own | copies), frozenset(copies)) if own or copies else None


def beside_text(model: nn.Module) -> frozenset[nn.Module]:
    """The modules that see something else than a text's tokens: images, sounds, or learned prompts.

    Those are what a transformers model of several kinds of input has beside what reads the text, and the head.
    """
    found, whole = set(_prompts(model)), multimodal(model)
    if whole is not None and (decoder := whole.get_decoder()) is not whole:
        text = {*decoder.modules()}
        for find in (whole.get_input_embeddings, whole.get_output_embeddings):
            with suppress(NotImplementedError):  # of models with two towers, such as CLIP
                text.update(() if find() is None else find().modules())
        found.update({*whole.modules()} - text)
    return frozenset(found)


def multimodal(model: nn.Module) -> Any:
    """The transformers model that takes images or sounds too, which a model is or wraps; None of others."""
    return next(filter(_is_multimodal, model.modules()), None)


def _prompts(model: Any) -> list[nn.Module]:
    """What learns the prompt of the active adapter, if it is one."""
    prompts = getattr(model, "prompt_encoder", None)
    return [*prompts[model.active_adapter].modules()] if _by_adapter(prompts) else []


def _by_adapter(part: object) -> TypeIs[nn.ModuleDict]:
    return isinstance(part, nn.ModuleDict)


def _is_multimodal(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    several = any(getattr(config, name, None) is not None for name in ("vision_config", "audio_config"))
    return several and callable(getattr(module, "get_decoder", None))
