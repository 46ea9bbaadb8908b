"""Models of images and text: scores against products of per-example gradients by autograd, in the towers of both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import wherefrom as wf
from tests.models import TRANSFORMERS, relative_error
from wherefrom.runtime.errors import InputError, LayerError

pytestmark = pytest.mark.skipif(TRANSFORMERS < (5,), reason="configurations of transformers 5")

IMAGE = 19  # the token that stands for an image's
TEXT: dict[str, Any] = {
    "vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4, "initializer_range": 0.3,
}  # fmt: skip


def llava() -> Any:
    """Four tokens an image, of the last but one layer; the last has no part in anything."""
    vision, text = hf.CLIPVisionConfig(**VISION), hf.LlamaConfig(**TEXT)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2)
    return hf.LlavaForConditionalGeneration(config)


def paligemma(image: int = IMAGE) -> Any:
    text = {**TEXT, "model_type": "gemma", "head_dim": 4}
    vision = {**VISION, "model_type": "siglip_vision_model", "projection_dim": 8}
    config = hf.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=image, projection_dim=8)
    return hf.PaliGemmaForConditionalGeneration(config)


def idefics3() -> Any:
    """One token an image, of four patches."""
    text = {**TEXT, "model_type": "llama", "pad_token_id": 0}
    config = hf.Idefics3Config(vision_config=VISION, text_config=text, scale_factor=2, image_token_id=IMAGE)
    return hf.Idefics3ForConditionalGeneration(config)


def qwen2() -> Any:
    """Images of any size, whose patches are flattened, four of them to a token."""
    vision = {"depth": 2, "embed_dim": 8, "hidden_size": 8, "num_heads": 2, "mlp_ratio": 2, "patch_size": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}
    config = hf.Qwen2VLConfig(
        vision_config=vision, text_config={**TEXT, "rope_parameters": rope}, image_token_id=IMAGE, video_token_id=18,
        vision_start_token_id=17, vision_end_token_id=16,
    )  # fmt: skip
    return hf.Qwen2VLForConditionalGeneration(config)


def made(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.random.fork_rng():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.4)
    return nn.Module.to(model, torch.float64).eval()


def words(count: int, seed: int) -> list[int]:
    return torch.randint(1, 16, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(tokens: int, lengths: Sequence[int], *images: int) -> list[object]:
    """A picture, [*images, 3, 8, 8], and words after it."""
    return [
        {"input_ids": [1] + [IMAGE] * tokens + words(count, row), "pixel_values": pixels(*images, 3, 8, 8, seed=row)}
        for row, count in enumerate(lengths)
    ]


def patches(sizes: Sequence[tuple[int, int]]) -> list[object]:
    """A picture of any height and width, as Qwen2-VL's processor makes it."""
    return [
        {
            "input_ids": [1, 17] + [IMAGE] * (height * width // 4) + [16] + words(row + 2, row),
            "mm_token_type_ids": [0, 0] + [1] * (height * width // 4) + [0] * (row + 3),
            "pixel_values": pixels(height * width, 24, seed=row),
            "image_grid_thw": [[1, height, width]],
        }
        for row, (height, width) in enumerate(sizes)
    ]


def check(model: Any, rows: list[object], run: Path, layers: list[str] | None = None, size: int | None = None) -> None:
    """Products of gradients; and curvature that does not depend on what stands beside an example."""
    task, queries, train = wf.CausalLM(layers), rows[:2], rows[1:]
    execution = wf.Execution(query_batch_size=size, train_batch_size=size)
    study = wf.Study(run, model, task, train=train, execution=execution)
    found = study.score(queries, wf.Dot()).values
    tracked = [part.parameter.requires_grad_() for layer in study.layers.values() for part in layer.parts]

    def gradient(row: object) -> Tensor:
        loss = task.train_loss(model, task.collate([task.select(model, row)]))
        parts = torch.autograd.grad(loss, tracked, allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in parts])

    expected = torch.stack([gradient(row) for row in queries]) @ torch.stack([gradient(row) for row in train]).T
    assert relative_error(found, expected) < 1e-9
    method = wf.EKFAC(empirical=True)
    alone = wf.Execution(query_batch_size=1, train_batch_size=1)
    one = wf.Study(run / "alone", model, task, train=train, execution=alone).score(queries, method).values
    assert relative_error(study.score(queries, method).values, one) < 1e-6


@pytest.mark.parametrize("layers", [None, ["*"]])
def test_llava(tmp_path: Path, layers: list[str] | None) -> None:
    check(made(llava()), pictures(4, (4, 7, 2)), tmp_path, layers)


def typed(row: Any) -> dict[str, Any]:
    """With a prefix of types 0, the picture and a word, and a suffix of types 1."""
    return {**row, "token_type_ids": [0] * 6 + [1] * (len(row["input_ids"]) - 6)}


def test_paligemma(tmp_path: Path) -> None:
    """Which sees a prefix in both directions, and says by types of tokens where it ends."""
    model, rows = made(paligemma()), pictures(4, (4, 7, 2))
    check(model, [typed(row) for row in rows], tmp_path)
    with pytest.raises(InputError, match="there are no 'token_type_ids', by which PaliGemma"):
        wf.Study(tmp_path / "untyped", model, wf.CausalLM(), train=rows).fit()


def test_a_tower_whose_patches_are_as_many_as_a_padded_text_has_tokens(tmp_path: Path) -> None:
    """The text's padding is not the picture's."""
    check(made(idefics3()), pictures(1, (2, 1, 2), 1), tmp_path, size=2)


def test_qwen2_vl_flattens_patches_and_is_taken_one_by_one(tmp_path: Path) -> None:
    model, rows = made(qwen2()), patches([(4, 4), (4, 8), (4, 4)])
    check(model, rows, tmp_path, size=1)
    study = wf.Study(tmp_path / "several", model, wf.CausalLM(), train=rows, execution=wf.Execution(train_batch_size=3))
    with pytest.raises(LayerError, match=r"images of all examples at once.*batch sizes of 1.*or leave the layer out"):
        study.score(rows[:1], wf.Dot())
    check(model, rows, tmp_path / "text", ["model.language_model.*"], size=3)


def test_an_example_without_an_image_has_no_part_in_its_tower(tmp_path: Path) -> None:
    rows = [*pictures(4, (4, 7)), {"input_ids": [1, *words(5, 3)]}]
    model = made(llava())
    check(model, rows, tmp_path, size=1)
    with pytest.raises(InputError, match="One example has the columns"):
        wf.Study(tmp_path / "three", model, wf.CausalLM(), train=rows, execution=wf.Execution(train_batch_size=3)).fit()


def test_adapters_in_both_towers(tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "linear_1"], init_lora_weights=False)
    model = peft.get_peft_model(llava(), config)
    check(nn.Module.to(model, torch.float64).eval(), pictures(4, (4, 7, 2)), tmp_path)


def test_what_a_processor_makes_is_taken_as_it_is(tmp_path: Path) -> None:
    """Batches of one: tokens [1, tokens], and images with a dimension for those of the batch."""
    model, task = made(llava()), wf.CausalLM()
    rows = pictures(4, (4, 7, 2))
    batches: list[object] = [
        {"input_ids": torch.tensor([row["input_ids"]]), "pixel_values": row["pixel_values"][None]}  # type: ignore[index]
        for row in rows
    ]
    expected = wf.Study(tmp_path / "plain", model, task, train=rows).score(rows, wf.Dot()).values
    assert torch.equal(wf.Study(tmp_path, model, task, train=batches).score(batches, wf.Dot()).values, expected)
    with pytest.raises(InputError, match=r"some 'input_ids' are \[tokens\] and others \[1, tokens\]"):
        task.collate([rows[0], batches[1]])
    two: list[object] = [
        {"input_ids": [[1] + [IMAGE] * 8 + words(3, row)], "pixel_values": pixels(2, 3, 8, 8, seed=row)}
        for row in range(3)
    ]
    check(model, two, tmp_path / "two", size=1)
    with pytest.raises(LayerError, match="images of all examples at once"):
        wf.Study(tmp_path / "two", model, task, train=two, execution=wf.Execution(train_batch_size=3)).fit()
    grids = [{"input_ids": [[1, 2]], "image_grid_thw": [[1, 2, 2]] * count} for count in (1, 2)]
    batch = task.collate([{**each, "pixel_values": pixels(4, 2)} for each in grids])
    assert batch["image_grid_thw"].shape == (3, 3)
    assert batch["pixel_values"].shape == (8, 2)
    plain = [{"input_ids": [1, 2], "image_grid_thw": [1, 2, 2], "pixel_values": pixels(4, 2)}] * 2
    assert task.collate(plain)["image_grid_thw"].shape == (2, 3)


def test_tokens_that_stand_for_images_are_not_counted(tmp_path: Path) -> None:
    """And may be none of the model's, as others may not."""
    task = wf.CausalLM()
    for model in (made(llava()), made(paligemma(image=25))):
        mark = model.config.image_token_id
        ids = [1] + [mark] * 4 + [3, 4]
        row = typed({"input_ids": ids, "pixel_values": pixels(3, 8, 8)})
        batch = task.collate([task.select(model, row)])
        loss = task.train_loss(model, batch)
        with torch.no_grad():
            logits = model(**{name: each for name, each in batch.items() if name != "labels"}).logits[0]
        assert relative_error(loss, -logits.log_softmax(1)[[4, 5], [3, 4]].sum()) < 1e-12
        assert wf.Study(tmp_path / str(mark), model, task, train=[row]).score([row], wf.Dot()).values.isfinite().all()
    with pytest.raises(InputError, match="'input_ids' holds token 24, and the model has tokens 0 to 19"):
        wf.Study(tmp_path, model, task, train=[typed({**row, "input_ids": [24, *ids]})]).fit()


def test_a_checkpoint_of_images_and_text_is_loaded(tmp_path: Path) -> None:
    llava().save_pretrained(tmp_path)
    rows: list[Any] = pictures(4, (4, 7))
    rows = [{**row, "pixel_values": row["pixel_values"].float()} for row in rows]
    for number, task in enumerate((None, wf.CausalLM(["*.linear_1"]))):
        study = wf.study_from_pretrained(tmp_path, rows, task=task, run=tmp_path / str(number))
        assert study.score(study.prepare(rows), wf.Dot()).values.shape == (2, 2)
