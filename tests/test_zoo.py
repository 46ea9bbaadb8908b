"""The zoo: every model family against autograd, and the published table against the code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import pytest
from packaging.version import Version
from run_zoo import DOCUMENT, every, page
from torch import Tensor, nn
from workload import RESULTS
from zoo.families import FAMILIES
from zoo.family import Family
from zoo.measure import outcome, score_error, tracked

import wherefrom as wf

PUBLISHED: dict[str, Any] = json.loads((RESULTS / "zoo.json").read_text())
ROWS: dict[str, Any] = {name: row for rows in PUBLISHED["families"].values() for name, row in rows.items()}
# Some models compute in float32 whatever their weights are, such as routers and some normalisations.
PRECISE = 1e-6
# Layers of which a usual model is made in less than a second; of more, `make zoo` alone counts them.
QUICK = 5000

pytestmark = pytest.mark.skipif(
    Version(version("transformers")) < Version(PUBLISHED["transformers"]), reason="older than what the zoo was made of"
)


def by_name(family: Family) -> str:
    return family.name


@pytest.mark.parametrize("family", every(), ids=by_name)
def test_gradients_are_those_of_autograd_and_the_table_says_what_is_tracked(family: Family) -> None:
    found, published = outcome(family), ROWS[family.name]
    for error in (found.error, found.alone, published["error"], published["alone"], published["scores"]):
        assert error is None or error < PRECISE
    if version("transformers") != PUBLISHED["transformers"]:
        return
    now: dict[str, object] = {
        "model": found.model, "task": found.task, "when_named": list(found.when_named), "never": list(found.never),
        "idle": list(found.idle), "note": family.note,
    }  # fmt: skip
    assert (found.refused is None) == (published["refused"] is None), found.refused
    if published["layers"] < QUICK:
        layers, share = tracked(family, found.idle)
        now |= {"layers": layers, "share": pytest.approx(share, abs=1e-12)}
    assert {name: published[name] for name in now} == now, "make zoo writes the table"


@pytest.mark.parametrize("group", FAMILIES)
def test_scores_do_not_depend_on_the_batch_size(group: str) -> None:
    """Of one family of each kind; `make zoo` looks at all."""
    family = next(each for each in FAMILIES[group] if ROWS[each.name]["refused"] is None)
    assert score_error(family, wf.EKFAC()) < PRECISE


class OfTheBatch(wf.CausalLM):
    """A loss that is a mean over the batch: what an example adds depends on the others."""

    def train_loss(self, model: nn.Module, batch: Mapping[str, Tensor], *arguments: Any) -> Tensor:
        return super().train_loss(model, dict(batch), *arguments) / len(batch["input_ids"])


def test_the_zoo_sees_what_is_wrong() -> None:
    family = replace(next(each for each in every() if each.name == "Llama"), task=OfTheBatch)
    found = outcome(family)
    assert found.error is not None and found.error > 0.1
    assert score_error(family, wf.EKFAC()) > 0.1


def test_the_published_table_is_the_one_that_was_measured() -> None:
    assert DOCUMENT.read_text() == page(), "python benchmarks/run_zoo.py --only_page writes it anew"
    assert list(ROWS) == [each.name for each in every()]


# What kronfluence 1.0.1 and bergson name in their documentation and tests, and more kinds than both have.
PEERS: Sequence[str] = (
    "LlamaForCausalLM", "GPT2LMHeadModel", "BertForSequenceClassification", "T5ForConditionalGeneration",
    "ResNetForImageClassification", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GPTNeoXForCausalLM", "GemmaForCausalLM",
    "OlmoForCausalLM", "GptOssForCausalLM", "MixtralForCausalLM",
)  # fmt: skip


def test_it_has_what_others_have_and_more() -> None:
    classes = {row["model"] for row in ROWS.values()}
    assert classes.issuperset(PEERS)
    assert len(classes) > 45
