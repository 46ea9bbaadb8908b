"""Models without weights: a published shape or a config, built on the "meta" device, and what an example takes there.

The library's own code runs on tensors that have a shape and no numbers, so that operations and bytes are counted as in
a real run, for a model of any size, in seconds. This module knows transformers and the sweep; it does not know what is
planned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from wherefrom.engine.loading import Examples
from wherefrom.engine.modules.layers import TrackedLayer, select_layers
from wherefrom.engine.sweep import Sweep
from wherefrom.hf.refusals import refuse_kernels
from wherefrom.hf.text import local_path
from wherefrom.runtime.errors import InputError, first_line, require
from wherefrom.runtime.memory import Footprint
from wherefrom.tasks.language import CausalLM

# The shapes in the models' published configurations, by the names that transformers has for them.
PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257,
    },
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "llama-3-70b": {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 8192, "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}  # fmt: skip

_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Blueprint:
    """A model's shape, and what one training sequence takes.

    Attributes:
        weights: how many there are, each counted once.
        weight_bytes: what they take.
        gathered_bytes: what a rank holds at once of weights that are sharded block by block (FSDP): those outside the
            blocks, the block that runs, and the next.
        layers: the tracked ones.
    """

    name: str
    weights: int
    weight_bytes: int
    gathered_bytes: int
    layers: Mapping[str, TrackedLayer]
    example: Footprint


def measure(
    name: str,
    length: int,
    *,
    half_precision: bool = False,
    patterns: Sequence[str] | None = None,
    device: torch.device | None = None,
) -> Blueprint:
    """Build a model without weights and count what a sequence takes, forward and backward.

    Args:
        name: one of `PRESETS`, a model directory or its `config.json`.
        length: tokens of a sequence.
        half_precision: on a GPU, a model that was loaded in bfloat16, with fused attention; otherwise float32, with
            attention as products of matrices, as `precision` runs it. Autocast itself does not exist without a device:
            what it keeps in float32 of norms takes a little more than is counted here.
        patterns: of the layers to track; None tracks all but the output head.
        device: that the plan is for; a GPU by default.

    Raises:
        InputError: there is no such model, it takes no sequences of that length, or its code needs numbers.
        LayerError: a pattern reaches no layer.
    """
    half_on_gpu = half_precision and (device is None or device.type == "cuda")
    model = model_without_weights(name, torch.bfloat16 if half_on_gpu else torch.float32)
    longest = getattr(model.config, "max_position_embeddings", None)
    if length < 2 or (longest is not None and length > longest):
        raise InputError(f"length={length}: expected 2 to {longest} tokens, which {name} was made for.")
    task = CausalLM(patterns)
    sweep: Sweep[dict[str, Tensor]] = Sweep(model, task, select_layers(model, task.layers, task.head(model)))
    examples = Examples([{"input_ids": [0] * length}], task)
    try:
        with _Assumptions(fused_attention=half_on_gpu):
            sweep = replace(sweep, layers=sweep.running(examples))
            example = sweep.footprint(examples)
    except RuntimeError as error:  # of the model's own code
        raise InputError(
            f"model={name!r}: its code does not run without weights ({first_line(error)}). Llama and its relatives do "
            f"with transformers 5.5 or newer; {require('transformers').__version__} is installed."
        ) from error
    size = sum(each.numel() for each in model.parameters())
    each_bytes = next(model.parameters()).element_size()
    return Blueprint(name, size, size * each_bytes, _gathered(model) * each_bytes, sweep.layers, example)


def model_without_weights(name: str, dtype: torch.dtype) -> Any:
    """A causal language model on the "meta" device, from a preset, a directory or a `config.json`."""
    transformers, path = require("transformers"), local_path(name)
    if name in PRESETS:
        config = transformers.AutoConfig.for_model(**PRESETS[name])
    elif path.name == "config.json" or (path / "config.json").is_file():
        try:
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # whatever transformers makes of a file that is not its own
            raise InputError(
                f"model={name!r}: cannot be read as a model's configuration ({first_line(error)})."
            ) from error
    else:
        raise InputError(
            f"model={name!r}: expected one of {', '.join(PRESETS)}, a model directory, or the path of a config.json "
            "(a hub model's is enough; its weights are not needed)."
        )
    refuse_kernels(name, config)
    layers = getattr(config, "num_hidden_layers", 1)
    if not isinstance(layers, int) or not 0 < layers <= _MOST_LAYERS:  # each is built, even if only on paper
        raise InputError(f"model={name!r}: its configuration has {layers} layers; expected 1 to {_MOST_LAYERS}.")
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.tie_weights()  # which transformers 5.0 leaves out without numbers
        return model
    except Exception as error:  # another kind of model, or sizes that do not belong together
        raise InputError(
            f"model={name!r}: no causal language model can be built of it ({first_line(error)})."
        ) from error


def _gathered(model: nn.Module) -> int:
    """How many weights are whole at once while every block of the longest list of modules is sharded by itself."""
    lists = [[_count(each) for each in module] for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = max(lists, key=sum, default=[])
    return _count(model) - sum(blocks) + sum(sorted(blocks)[-2:])


def _count(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


class _Assumptions(TorchFunctionMode):
    """What tensors without numbers cannot tell.

    A question about their values is answered yes: models ask whether nothing is padded and nothing packed.
    Attention is that of a GPU where it is `fused_attention`, which the device without numbers does not have.
    """

    def __init__(self, fused_attention: bool) -> None:
        super().__init__()
        self._fused_attention = fused_attention

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func is Tensor.__bool__ and args[0].is_meta:
            return True
        if func is functional.scaled_dot_product_attention and self._fused_attention:
            causal, scale = options.get("is_causal", False), options.get("scale")
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3], 0.0, causal, scale=scale)[0]
        return func(*args, **options)
