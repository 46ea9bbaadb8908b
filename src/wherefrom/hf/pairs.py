"""From texts and conversations with preferences to tokens, as TRL's DPO, KTO and reward trainers make them.

This module knows what `preparation` tells it of a tokenizer; it knows nothing of losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wherefrom.runtime.errors import InputError

if TYPE_CHECKING:
    from wherefrom.hf.preparation import Preparation

Example = Mapping[str, Any]

# Columns of numbers that the tasks read.
_NUMBERS = ("ref_chosen_logps", "ref_rejected_logps", "ref_logps", "margin", "kl")


def preferred(preparation: Preparation, example: Example, number: int) -> dict[str, Any]:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of texts or messages, whose prompt may be in both completions."""
    prompt, chosen, rejected = _with_prompt(example)
    return _encoded(preparation, example, number, prompt, {"chosen": chosen, "rejected": rejected})


def judged(preparation: Preparation, example: Example, number: int) -> dict[str, Any]:
    """`prompt_ids`, `completion_ids` and `label`."""
    encoded = _encoded(preparation, example, number, example["prompt"], {"completion": example["completion"]})
    return {**encoded, "label": example["label"]}


def rewarded(preparation: Preparation, example: Example, number: int) -> dict[str, Any]:
    """`chosen_ids` and `rejected_ids`, prompts and all; refuses what TRL leaves out, since it is too long."""
    found = {}
    for name in ("chosen", "rejected"):
        whole = _added(example.get("prompt"), example[name], number)
        found[f"{name}_ids"] = ids = _tokens(preparation, example, whole)
        if preparation.max_length is not None and len(ids) > preparation.max_length:
            raise InputError(
                f"Example {number} of the dataset: {name!r} makes {len(ids)} tokens, and max_length is "
                f"{preparation.max_length}. TRL leaves such pairs out of a training: leave it out too."
            )
    return _with_text(preparation, example, found)


def _with_prompt(example: Example) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected; without a column `prompt`, it is what both completions begin with (TRL's rule)."""
    chosen, rejected = example["chosen"], example["rejected"]
    if example.get("prompt") is not None:
        return example["prompt"], chosen, rejected
    shared = _shared(chosen, rejected)
    if shared == min(len(chosen), len(rejected)):
        shared -= 1  # so that no completion is empty
    elif isinstance(chosen, str) and chosen[:shared].endswith(" "):
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _encoded(
    preparation: Preparation, example: Example, number: int, prompt: Any, completions: Mapping[str, Any]
) -> dict[str, Any]:
    """The prompt's tokens, and each completion's: those after what the prompt and all of them begin with."""
    start = _tokens(preparation, example, prompt, alone=True)
    wholes = {name: _tokens(preparation, example, _added(prompt, each, number)) for name, each in completions.items()}
    shared = min(_shared(start, whole) for whole in wholes.values())
    found = {f"{name}_ids": whole[shared : preparation.max_length] for name, whole in wholes.items()}
    empty = next((name for name, ids in found.items() if not ids), None)
    if empty is not None:
        raise InputError(
            f"Example {number} of the dataset: its prompt makes {shared} tokens, and max_length is "
            f"{preparation.max_length}, so that nothing is left of {empty.removesuffix('_ids')!r}. TRL leaves such "
            "rows out of a training: leave it out too, or give the max_length of the training."
        )
    return _with_text(preparation, example, {"prompt_ids": start[:shared], **found})


def _with_text(preparation: Preparation, example: Example, found: Mapping[str, list[int]]) -> dict[str, Any]:
    """Tokens with the example's numbers, and a text for readers."""
    texts = (f"{name.removesuffix('_ids')}: {preparation.decoded(ids)}" for name, ids in found.items())
    numbers = {name: example[name] for name in _NUMBERS if example.get(name) is not None}
    return {**found, **numbers, "text": "\n\n".join(texts)}


def _added(prompt: Any, completion: Any, number: int) -> Any:
    """A prompt and a completion, texts or messages, as one."""
    if prompt is None:
        return completion
    if isinstance(prompt, str) != isinstance(completion, str):
        raise InputError(
            f"Example {number} of the dataset: of its prompt and completions, one is a text and one messages. Give "
            "both as the same; where the messages hold the prompt too, drop the column 'prompt'."
        )
    return prompt + completion if isinstance(prompt, str) else [*prompt, *completion]


def _tokens(preparation: Preparation, example: Example, whole: Any, alone: bool = False) -> list[int]:
    """Tokens of a text or of messages: of a prompt `alone` as it stands before a completion, or to the end."""
    if isinstance(whole, str):
        return preparation.ids(whole, end=not alone)
    return preparation.chat(whole, example, **({"add_generation_prompt": True} if alone else {}))["input_ids"]


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items two sequences begin with together."""
    differing = (position for position, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return next(differing, min(len(one), len(other)))
