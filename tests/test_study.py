"""What a study leaves as it is, what is reused, and what is refused."""

from __future__ import annotations

import errno
import resource
import shutil
from pathlib import Path

import pytest
import torch

import wherefrom as wf
from tests.models import Interrupted, Mlp, gpt2_case, mlp_case, relative_error
from tests.runs import only
from wherefrom.runtime.errors import DamagedError, InputError, LayerError, LossError, MismatchError, StorageError
from wherefrom.store.artifacts import Matrices, stored_matrices
from wherefrom.store.files import save_tensors, write_text


def test_sampled_factors_depend_on_the_seed_only(tmp_path: Path) -> None:
    case = gpt2_case()

    def eigenvalues(name: str, seed: int, batch_size: int | None) -> torch.Tensor:
        study = wf.Study(tmp_path / name, case.model, case.task, train=case.train)
        factors = study.fit(wf.Diagonal(seed=seed), execution=wf.Execution(train_batch_size=batch_size))
        return torch.cat([each.flatten() for each in factors.eigenvalues.values()])

    expected = eigenvalues("one", seed=3, batch_size=1)
    assert relative_error(eigenvalues("four", seed=3, batch_size=4), expected) < 1e-9
    assert relative_error(eigenvalues("all", seed=3, batch_size=None), expected) < 1e-9
    assert relative_error(eigenvalues("other", seed=4, batch_size=1), expected) > 1e-2


def test_many_query_blocks_give_the_scores_of_one(tmp_path: Path) -> None:
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    expected = study.score(case.queries, name="one-block").values
    one_by_one = wf.Execution(memory_budget=1e-9)
    found = study.score(case.queries, name="many-blocks", execution=one_by_one).values
    assert relative_error(found, expected) < 1e-12
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == ["many-blocks", "one-block"]


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = Mlp()
    model.first.weight.requires_grad_(False)
    model.twice.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    case = mlp_case(torch.float32)
    study = wf.Study(tmp_path, model, case.task, train=case.train)
    study.score(case.queries, wf.EKFAC())

    class Failing(wf.Classification):
        def train_loss(self, *arguments: object) -> torch.Tensor:
            super().train_loss(*arguments)  # type: ignore[arg-type]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wf.Study(tmp_path / "failing", model, Failing(), train=case.train).fit(wf.Diagonal())
    assert [each.requires_grad for each in model.parameters()] == [False, True, True, True, True]
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert all(not module._forward_hooks for module in model.modules())
    assert all(each.grad is None for each in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_top_is_the_sorted_matrix(tmp_path: Path) -> None:
    values = torch.tensor([[0.5, -1.0, 2.0], [3.0, 4.0, -5.0]])
    hits = wf.Scores(values, {}).top(2)
    assert [tuple(hit) for hit in hits] == [(0, 1, 2, 2.0), (0, 2, 0, 0.5), (1, 1, 1, 4.0), (1, 2, 0, 3.0)]
    assert len(wf.Scores(values, {}).top(10)) == 6
    with pytest.raises(InputError, match="k=0"):
        wf.Scores(values, {}).top(0)


# Reuse: nothing is computed twice, and nothing stale is used.


class Counting(wf.Classification):
    """Counts how often a loss is computed."""

    _calls = 0

    def train_loss(self, *arguments: object) -> torch.Tensor:
        Counting._calls += 1
        return super().train_loss(*arguments)  # type: ignore[arg-type]


def test_strategies_share_what_they_have_in_common(tmp_path: Path) -> None:
    case = mlp_case()
    wf.Study(tmp_path, case.model, Counting(), train=case.train).fit(wf.EKFAC())
    Counting._calls = 0
    again = wf.Study(tmp_path, case.model, Counting(), train=case.train)
    again.fit(wf.EKFAC())
    again.fit(wf.KFAC())  # shares the basis
    assert Counting._calls == 1  # which layers run
    again.fit(wf.EKFAC(), overwrite=True)
    assert Counting._calls > 1


def test_the_first_block_of_scores_goes_on_where_it_was(tmp_path: Path) -> None:
    """Interrupted in its last batch, of seven: those before are saved, though no block of the matrix is."""
    case, task = gpt2_case(), Interrupted(["transformer.h.*"])
    execution = wf.Execution(checkpoint_seconds=0, train_batch_size=2)

    def losses(run: str, allowed: int = 10**9) -> int:
        task._left = allowed
        study = wf.Study(tmp_path / run, case.model, task, train=case.train, execution=execution)
        study.score(case.queries, wf.Dot())
        return allowed - task._left

    whole = losses("whole")
    with pytest.raises(KeyboardInterrupt):
        losses("interrupted", whole - 1)
    assert losses("interrupted") == whole - 6


def test_a_matrix_whose_result_cannot_be_written_stays_for_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the disk is full after all: what was computed is not computed again."""
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, Counting(), train=case.train)

    def full(file: Path, *arguments: object) -> None:
        if file.parent.name == "mine.part":
            raise OSError(errno.ENOSPC, "No space left on device")
        save_tensors(file, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr("wherefrom.store.artifacts.save_tensors", full)
        with pytest.raises(StorageError, match="Cannot write .*mine .*No space left.*what is finished is safe"):
            study.score(case.queries, name="mine")
    probes = 2  # to plan the batches
    Counting._calls = 0
    found = study.score(case.queries, name="mine")
    assert Counting._calls == probes
    assert torch.equal(found.values, study.score(case.queries, name="other").values)


def test_factors_of_something_else_are_refused_by_name(tmp_path: Path) -> None:
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    study.fit(name="mine")
    with pytest.raises(MismatchError, match=r"targets: stored sampled, seed 0, now sampled, seed 1.*overwrite"):
        study.fit(wf.EKFAC(seed=1), name="mine")
    with pytest.raises(MismatchError, match="training data: stored 12 examples .*, now 11 examples"):
        wf.Study(tmp_path, case.model, case.task, train=case.train[:11]).fit(name="mine")
    with torch.no_grad():
        next(case.model.parameters()).add_(1e-9)
    with pytest.raises(MismatchError, match="model: stored"):
        wf.Study(tmp_path, case.model, case.task, train=case.train).fit(name="mine")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "missing", "manifest"])
def test_damaged_files_are_named_and_not_used(tmp_path: Path, damage: str) -> None:
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    expected = study.fit(wf.Diagonal())
    folder = only(tmp_path / "factors", "sampled") / "diagonal"
    file = folder / ("manifest.json" if damage == "manifest" else "tensors.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "flipped":
        content[-3] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: 0 if damage == "empty" else len(content) // 2])
    with pytest.raises(DamagedError, match=str(file.name)):
        study.fit(wf.Diagonal())
    repaired = study.fit(wf.Diagonal(), overwrite=True)
    assert all(torch.equal(repaired.eigenvalues[name], each) for name, each in expected.eigenvalues.items())


def test_a_write_that_fails_midway_leaves_nothing_behind(tmp_path: Path) -> None:
    """The operating system cuts every file off at 300 bytes, as a quota or a full disk would."""
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(StorageError, match="Cannot write .*diagonal .*File too large.*what is finished is safe"):
            study.fit(wf.Diagonal())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".lock"]
    study.fit(wf.Diagonal())


def test_a_matrix_without_room_on_the_disk_is_refused_before_it_is_written(tmp_path: Path) -> None:
    """Or the disk might be full when the last block of it is found."""
    part = tmp_path / "scores" / "ekfac.part"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(
            StorageError, match="Cannot write .*0.38 MiB needed.*File too large.*what is finished is safe"
        ):
            Matrices(part, {"values": ((100, 1000), torch.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "scores").iterdir())
    Matrices(part, {"values": ((2, 3), torch.float64)})
    assert torch.equal(stored_matrices(part)["values"], torch.zeros(2, 3).double())


def test_a_run_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    case = mlp_case()
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Cannot lock .*file: File exists"):
        wf.Study(tmp_path / "file", case.model, case.task, train=case.train).fit(wf.Diagonal())


def test_too_little_space_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("wherefrom.store.files.shutil.disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match="Not enough space .* MiB needed, 0.00 MiB free"):
        study.fit(wf.Diagonal())


def test_a_name_that_is_too_long_is_an_error_of_ours(tmp_path: Path) -> None:
    name = "x" * 300
    with pytest.raises(StorageError, match="Cannot write .* File name too long"):
        write_text(tmp_path / name, "a page")
    with pytest.raises(InputError, match="holds no wherefrom.json"):
        wf.read_recording(tmp_path / name)


# Wrong use.


def test_wrong_use_is_answered_well(tmp_path: Path) -> None:
    case = mlp_case()
    with pytest.raises(InputError, match="train is empty"):
        wf.Study(tmp_path, case.model, case.task, train=[])
    with pytest.raises(LayerError, match=r"'twise' matches no layer. Close names: twice"):
        wf.Study(tmp_path, case.model, wf.Classification(["twise"]), train=case.train)
    with pytest.raises(LayerError, match="no layer to track: supported kinds are Linear, Conv1D"):
        wf.Study(tmp_path, torch.nn.ReLU(), case.task, train=case.train)
    with pytest.raises(InputError, match="expected a list"):
        wf.Classification("twice")
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    with pytest.raises(InputError, match="train_batch_size=0: expected at least 1"):
        wf.Execution(train_batch_size=0)
    with pytest.raises(InputError, match="queries is empty"):
        study.score([], wf.Dot())
    with pytest.raises(InputError, match="name='../up'"):
        study.fit(wf.EKFAC(), name="../up")
    assert not (tmp_path / "factors").exists()


def test_a_loss_that_is_not_a_scalar_is_refused(tmp_path: Path) -> None:
    class Vector(wf.Classification):
        def train_loss(self, model, batch, sampler=None):  # type: ignore[no-untyped-def]
            return model(batch[0]).sum(1)

    class Detached(wf.Classification):
        def train_loss(self, *arguments: object) -> torch.Tensor:
            return super().train_loss(*arguments).detach()  # type: ignore[arg-type]

    case = mlp_case()
    with pytest.raises(LossError, match=r"must be a scalar tensor.*returned \[3\].*reduction='sum'"):
        wf.Study(tmp_path, case.model, Vector(), train=case.train).fit(execution=wf.Execution(train_batch_size=3))
    with pytest.raises(LossError, match="does not depend on any tracked layer"):
        wf.Study(tmp_path, case.model, Detached(), train=case.train).fit(wf.EKFAC())


def test_a_loss_that_is_not_finite_names_its_batch(tmp_path: Path) -> None:
    case = mlp_case()
    case.train[7] = (torch.full((4,), float("nan"), dtype=torch.float64), torch.tensor(0))
    execution = wf.Execution(checkpoint_seconds=0, train_batch_size=2)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train, execution=execution)
    with pytest.raises(LossError, match="covariance: the loss of examples 6 to 7 is nan"):
        study.fit(wf.EKFAC(empirical=True))


def test_float32_scores_do_not_depend_on_the_batch_with_fused_attention(tmp_path: Path) -> None:
    """Sequences of the length and heads of the width for which PyTorch takes its fused attention."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_positions=96, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(0)
    rows: list[object] = [
        {"input_ids": torch.randint(61, (length,), generator=generator)} for length in (96, 70, 96, 33, 96, 80, 12)
    ]
    found = []
    for size in (1, 7):
        execution = wf.Execution(train_batch_size=size, query_batch_size=size)
        study = wf.Study(tmp_path / str(size), model, wf.CausalLM(), train=rows, execution=execution)
        found.append(study.score(rows).values)
    assert relative_error(*found) < 2e-5


def test_a_replaced_basis_takes_its_eigenvalues_with_it(tmp_path: Path) -> None:
    """Another batch rounds covariances otherwise, and eigenvectors of nearly equal eigenvalues are then others."""
    case = mlp_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    study.fit()
    single = wf.Execution(train_batch_size=1)
    study.fit(wf.KFAC(), overwrite=True, execution=single)
    assert not (only(tmp_path / "factors", "sampled") / "eigenvalues").exists()
    expected = wf.Study(tmp_path / "other", case.model, case.task, train=case.train).fit(execution=single)
    found = study.fit(execution=single)
    assert all(torch.equal(found.eigenvalues[name], each) for name, each in expected.eigenvalues.items())


def test_a_lost_basis_takes_its_eigenvalues_with_it(tmp_path: Path) -> None:
    """As above, where somebody has deleted what was damaged."""
    case = mlp_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    study.fit()
    single = wf.Execution(train_batch_size=1)
    for name in ("covariance", "eigenbasis"):
        shutil.rmtree(only(tmp_path / "factors", "sampled") / name)
    study.fit(wf.KFAC(), execution=single)
    assert not (only(tmp_path / "factors", "sampled") / "eigenvalues").exists()
    expected = wf.Study(tmp_path / "other", case.model, case.task, train=case.train).fit(execution=single)
    found = study.fit(execution=single)
    assert all(torch.equal(found.eigenvalues[name], each) for name, each in expected.eigenvalues.items())
