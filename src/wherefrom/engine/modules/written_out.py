"""Which modules are computed through maps of their weights, and how they are made to.

A kind is a row of `WRITTEN_OUT`. It says which maps a module is made of, and computes with these exactly what
the module computes; whatever is to be captured is what the maps read and give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from wherefrom.engine.modules.layer_types import entry_of
from wherefrom.engine.modules.linear_map import Map
from wherefrom.engine.modules.written.adapters import (
    adalora_forward,
    adalora_maps,
    embedding_forward,
    embedding_maps,
    ia3_forward,
    ia3_maps,
    magnitude_forward,
    magnitude_maps,
    without_own_products,
)
from wherefrom.engine.modules.written.attention import attention_forward, attention_maps
from wherefrom.engine.modules.written.experts import (
    dbrx_forward,
    dbrx_maps,
    expert_forward,
    expert_maps,
    llama4_forward,
    llama4_maps,
    of_another_form,
)
from wherefrom.engine.modules.written.recurrent import recurrent_forward, recurrent_maps
from wherefrom.engine.modules.written.routers import router_forward, router_maps, without_linear_weight
from wherefrom.runtime.placement import computed_by, computes_by


@dataclass(frozen=True)
class Kind:
    """How modules of a kind are written out.

    Attributes:
        maps: the linear maps of a module by their names inside of it; "" is the module itself, which has one alone.
        forward: what stands in for the module's `forward`: it calls the maps, which are those of `maps`. The first
            dimension of what a map reads is the batch, as of any other layer, unless it comes with a `Routing`.
        sparse: whether it is usual that a map gets nothing in a pass.
        refused: why a module of this kind cannot be written out; None when it can.
    """

    maps: Callable[[nn.Module], Mapping[str, Map]]
    forward: Callable[[nn.Module, Mapping[str, Map]], Callable[..., Any]]
    sparse: bool = False
    refused: Callable[[nn.Module], str | None] = lambda module: None


# By the pattern of a qualified name, as `LAYER_TYPES` are.
_IA3 = Kind(ia3_maps, ia3_forward, refused=without_own_products)
_ADALORA = Kind(adalora_maps, adalora_forward, refused=without_own_products)
WRITTEN_OUT: dict[str, Kind] = {
    "peft.tuners.ia3.layer.Linear": _IA3,
    "peft.tuners.ia3.bnb.Linear*": _IA3,
    "peft.tuners.adalora.layer.SVDLinear": _ADALORA,
    "peft.tuners.adalora.bnb.SVDLinear*": _ADALORA,
    "peft.tuners.lora.layer.Embedding": Kind(embedding_maps, embedding_forward, refused=without_own_products),
    "peft.tuners.lora.dora.DoraLinearLayer": Kind(magnitude_maps, magnitude_forward),
    "torch.nn.modules.activation.MultiheadAttention": Kind(attention_maps, attention_forward),
    "torch.nn.modules.rnn.RNN": Kind(recurrent_maps, recurrent_forward),
    "torch.nn.modules.rnn.GRU": Kind(recurrent_maps, recurrent_forward),
    "torch.nn.modules.rnn.LSTM": Kind(recurrent_maps, recurrent_forward),
    "transformers.models.dbrx.modeling_dbrx.DbrxExperts": Kind(dbrx_maps, dbrx_forward, sparse=True),
    "transformers.models.llama4.modeling_llama4.Llama4TextExperts": Kind(llama4_maps, llama4_forward, sparse=True),
    "transformers.models.*Experts": Kind(expert_maps, expert_forward, sparse=True, refused=of_another_form),
    "transformers.models.*Router": Kind(router_maps, router_forward, refused=without_linear_weight),
}


@dataclass(frozen=True, eq=False)
class WrittenOut:
    """A module with its linear maps."""

    module: nn.Module
    kind: Kind
    maps: Mapping[str, Map]


def written_out(module: nn.Module) -> WrittenOut | None:
    """A module's linear maps; None if it is of no kind that has them, or cannot be written out."""
    kind = written_out_kind(module)
    return None if kind is None or kind.refused(module) else WrittenOut(module, kind, kind.maps(module))


def written_out_kind(module: nn.Module) -> Kind | None:
    """The kind of a module; None if it has none, or a `forward` of its own."""
    return None if _is_replaced(module) else entry_of(module, WRITTEN_OUT)


@contextmanager
def through_maps(modules: Iterable[WrittenOut]) -> Iterator[None]:
    """Within it, modules compute through their linear maps; they are put back as they were."""
    with ExitStack() as stack:
        for each in modules:
            stack.enter_context(computes_by(each.module, each.kind.forward(each.module, each.maps)))
        yield


def _is_replaced(module: nn.Module) -> bool:
    """Whether somebody has given this module a `forward` that is not its class's."""
    found = vars(module).get(computed_by(module))
    return found is not None and getattr(found, "__func__", None) is not getattr(type(module), "forward", None)
