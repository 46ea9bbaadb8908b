"""From texts and conversations with preferences to tokens, as TRL's DPO, KTO and reward trainers make them.

This module knows what an `Encoder` tells it of a tokenizer; it knows nothing of losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wherefrom.hf.formats import NUMBERS, Example
from wherefrom.runtime.errors import InputError

if TYPE_CHECKING:
    from wherefrom.hf.encoding import Encoder


def preferred(encoder: Encoder, example: Example) -> dict[str, Any]:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of texts or messages, whose prompt may be in both completions."""
    prompt, chosen, rejected = _with_prompt(example)
    return _encoded(encoder, example, prompt, {"chosen": chosen, "rejected": rejected})


def judged(encoder: Encoder, example: Example) -> dict[str, Any]:
    """`prompt_ids`, `completion_ids` and `label`."""
    encoded = _encoded(encoder, example, example["prompt"], {"completion": example["completion"]})
    return {**encoded, "label": example["label"]}


def rewarded(encoder: Encoder, example: Example) -> dict[str, Any]:
    """`chosen_ids` and `rejected_ids`, prompts and all; refuses what TRL leaves out, since it is too long."""
    found: dict[str, Any] = {}
    for side in ("chosen", "rejected"):
        whole = _added(example.get("prompt"), example[side])
        found[f"{side}_ids"] = ids = _tokens(encoder, example, whole)
        if encoder.max_length is not None and len(ids) > encoder.max_length:
            raise InputError(
                f"{side!r} makes {len(ids)} tokens, and max_length is {encoder.max_length}. TRL leaves such pairs out "
                "of a training: leave it out too."
            )
    texts = {side: encoder.decoded(found[f"{side}_ids"]) for side in ("chosen", "rejected")}
    return {**found, **_numbers(example), "text": _shown(texts)}


def _with_prompt(example: Example) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected; without a column `prompt`, it is what both completions begin with (TRL's rule)."""
    chosen, rejected = example["chosen"], example["rejected"]
    if example.get("prompt") is not None:
        return example["prompt"], chosen, rejected
    shared = common_start(chosen, rejected)
    if shared == min(len(chosen), len(rejected)):
        shared -= 1  # so that no completion is empty
    elif isinstance(chosen, str) and chosen[:shared].endswith(" "):
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _encoded(encoder: Encoder, example: Example, prompt: Any, completions: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt's tokens, and each completion's: those after what the prompt and all of them begin with."""
    start = _tokens(encoder, example, prompt, alone=True)
    wholes = {side: _tokens(encoder, example, _added(prompt, each)) for side, each in completions.items()}
    shared = min(common_start(start, whole) for whole in wholes.values())
    found = {f"{side}_ids": whole[shared : encoder.max_length] for side, whole in wholes.items()}
    empty = next((name for name, ids in found.items() if not ids), None)
    if empty is not None:
        raise InputError(
            f"its prompt makes {shared} tokens, and max_length is {encoder.max_length}, so that nothing is left of "
            f"{empty.removesuffix('_ids')!r}. TRL leaves such examples out of a training: leave it out too, or give "
            "the max_length of the training."
        )
    texts = {side: encoder.decoded(ids) for side, ids in {"prompt": start[:shared], **_sides(found)}.items()}
    answer_start = len(_shown({"prompt": texts["prompt"], "": ""})) - 2  # what stands before the first completion
    shown = {"text": _shown(texts), "answer_start": answer_start}
    return {"prompt_ids": start[:shared], **found, **_numbers(example), **shown}


def _sides(found: Mapping[str, list[int]]) -> dict[str, list[int]]:
    return {name.removesuffix("_ids"): ids for name, ids in found.items()}


def _numbers(example: Example) -> dict[str, Any]:
    return {name: example[name] for name in NUMBERS if example.get(name) is not None}


def _shown(texts: Mapping[str, str]) -> str:
    return "\n\n".join(f"{name}: {text}" for name, text in texts.items())


def _added(prompt: Any, completion: Any) -> Any:
    """A prompt and a completion, texts or messages, as one."""
    if prompt is None:
        return completion
    if isinstance(prompt, str) != isinstance(completion, str):
        raise InputError(
            "of its prompt and completions, one is a text and one messages. Give both as the same; where the messages "
            "hold the prompt too, drop the column 'prompt'."
        )
    return prompt + completion if isinstance(prompt, str) else [*prompt, *completion]


def _tokens(encoder: Encoder, example: Example, whole: Any, alone: bool = False) -> list[int]:
    """Tokens of a text or of messages: of a prompt `alone` as it stands before a completion, or to the end."""
    if isinstance(whole, str):
        return encoder.ids(whole, end=not alone)
    return encoder.chat_ids(whole, example, answering=alone)


def common_start(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items two sequences begin with together."""
    differing = (place for place, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return next(differing, min(len(one), len(other)))
