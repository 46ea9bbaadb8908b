"""Cross-entropy in chunks is PyTorch's, with its gradients of every order, whatever the chunk."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional

from tests.models import relative_error
from wherefrom.runtime.errors import InputError
from wherefrom.tasks.losses import IGNORED, summed_cross_entropy
from wherefrom.tasks.sampling import Sampler, drawn_cross_entropy


@pytest.fixture(params=[1, 150, 2**21])
def chunk_bytes(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """Chunks of one row, a few rows and all rows of the logits below."""
    set_chunk_bytes(monkeypatch, request.param)
    return int(request.param)


def set_chunk_bytes(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr("wherefrom.tasks.losses._CHUNK_BYTES_PER_THREAD", count)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)


def expected_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """PyTorch's, of logits in the type that they have."""
    rows = logits.reshape(-1, logits.shape[-1])
    return functional.cross_entropy(rows, labels.reshape(-1), ignore_index=IGNORED, reduction="sum")


def with_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Our loss and its gradient by the logits, by one plain backward pass."""
    leaf = logits.detach().requires_grad_()
    loss = summed_cross_entropy(leaf, labels)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def example(*shape: int, seed: int = 0, ignored: float = 0.3) -> tuple[Tensor, Tensor]:
    """Logits of a shape [..., classes] in float64 and labels [...], a share of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    return logits, labels.masked_fill(torch.rand(labels.shape, generator=generator) < ignored, IGNORED)


@pytest.mark.usefixtures("chunk_bytes")
def test_derivatives_of_both_orders_are_finite_differences() -> None:
    logits, labels = example(2, 4, 5)
    assert 0 < int((labels == IGNORED).sum()) < 8
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: summed_cross_entropy(x, labels), logits, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: summed_cross_entropy(x, labels), logits, check_batched_grad=True)


@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    classes=st.integers(1, 40),
    seed=st.integers(0, 99),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_loss_and_gradient_are_those_of_pytorch(shape: list[int], classes: int, seed: int, ignored: float) -> None:
    logits, labels = example(*shape, classes, seed=seed, ignored=ignored)
    loss, gradient = with_gradient(logits, labels)
    torch.testing.assert_close(loss, expected_loss(logits, labels), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, grad(expected_loss)(logits, labels), rtol=1e-12, atol=1e-12)
    assert (gradient[labels == IGNORED] == 0).all()


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_logits_have_a_float32_loss_and_a_gradient_of_their_type(dtype: torch.dtype) -> None:
    wide, labels = example(3, 5, 12)
    logits = wide.to(dtype)
    loss, gradient = with_gradient(logits, labels)
    assert (loss.dtype, gradient.dtype, gradient.shape) == (torch.float32, dtype, logits.shape)
    assert relative_error(loss, expected_loss(logits.double(), labels)) < 1e-6
    exact = grad(expected_loss)(logits.double(), labels)
    # Rounded once at the end: half a unit in the last place, and what float32 adds.
    assert bool(((gradient - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all())


def test_gradients_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = example(7, 11, 300)
    found = []
    for chunk_bytes in (1, 5000, 2**30):
        set_chunk_bytes(monkeypatch, chunk_bytes)
        found.append(with_gradient(logits.float(), labels))
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(gradient, found[0][1])


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0)])
def test_vectorised_over_logits_labels_or_both(dims: tuple[int | None, int | None]) -> None:
    """Under `torch.func.grad`, as `StackedTraining` has it, and with the backward pass outside of `vmap`."""
    logits, labels = example(3, 4, 6)
    logits, labels = (each if dim == 0 else each[0] for each, dim in zip((logits, labels), dims, strict=True))
    pairs = [(logits[row] if dims[0] == 0 else logits, labels[row] if dims[1] == 0 else labels) for row in range(3)]
    gradients = torch.stack([grad(expected_loss)(*pair) for pair in pairs])
    torch.testing.assert_close(vmap(grad(summed_cross_entropy), dims)(logits, labels), gradients)
    leaf = logits.clone().requires_grad_()
    losses = vmap(summed_cross_entropy, dims)(leaf, labels)
    torch.testing.assert_close(losses.detach(), torch.stack([expected_loss(*pair) for pair in pairs]))
    total = gradients if dims[0] == 0 else gradients.sum(0)
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), leaf)[0], total)


def test_the_backward_pass_keeps_the_logits_and_little_else() -> None:
    logits, labels = example(4, 9, 50)
    logits.requires_grad_()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        summed_cross_entropy(logits, labels)
    assert kept.pop(logits.data_ptr()) == logits.numel()
    assert list(kept.values()) == 3 * [labels.numel()]  # the labels, the highest logits, the sums of exponentials


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_drawn_labels_are_those_of_the_sampler(dtype: torch.dtype) -> None:
    logits, labels = example(3, 20, 300)
    logits, counted, sampler = logits.to(dtype).requires_grad_(), labels != IGNORED, Sampler(4, [8, 5, 6])
    drawn = torch.where(counted, sampler.categorical(logits.detach(), counted), IGNORED)
    loss = drawn_cross_entropy(logits, counted, sampler)
    expected, gradient = with_gradient(logits, drawn)
    assert torch.equal(loss, expected)
    assert torch.equal(torch.autograd.grad(loss, logits)[0], gradient)


def test_what_is_far_from_zero_is_as_exact() -> None:
    """A logarithm of a sum would be rounded as the highest logit is, here to 1/1024, and all gradients with it."""
    logits, labels = example(5, 8, 400)
    logits = logits.float() + 2**14
    loss, gradient = with_gradient(logits, labels)
    assert relative_error(loss, expected_loss(logits.double(), labels)) < 1e-6
    assert relative_error(gradient, grad(expected_loss)(logits.double(), labels)) < 1e-6


def test_impossible_classes_have_no_probability() -> None:
    logits, labels = example(5, 8, 400)
    logits[..., 100:280] = -torch.inf
    labels = torch.where((labels >= 100) & (labels < 280), 7, labels)
    loss, gradient = with_gradient(logits, labels)
    torch.testing.assert_close(loss, expected_loss(logits, labels))
    torch.testing.assert_close(gradient, grad(expected_loss)(logits, labels))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_without_a_softmax_give_nan_unless_their_label_is_ignored(value: float) -> None:
    logits, labels = example(2, 40, ignored=0.0)
    logits[1, 5] = value
    loss, gradient = with_gradient(logits, labels)
    assert loss.isnan()
    assert gradient.isnan().any(1).tolist() == [False, True]
    labels[1] = IGNORED
    loss, gradient = with_gradient(logits, labels)
    torch.testing.assert_close(loss, expected_loss(logits[:1], labels[:1]))
    assert (gradient[1] == 0).all()


def test_no_value_is_looked_at() -> None:
    """Tensors without values have none to look at: a GPU would have been waited for."""
    logits, labels = torch.empty(4, 9, 50, device="meta"), torch.empty(4, 9, dtype=torch.int64, device="meta")
    loss, gradient = with_gradient(logits, labels)
    assert (loss.shape, gradient.shape) == ((), logits.shape)
    assert drawn_cross_entropy(logits, labels != IGNORED, Sampler(0, range(4))).shape == ()


def test_labels_that_do_not_belong_to_the_logits_are_refused() -> None:
    logits, labels = example(4, 9, 50)
    with pytest.raises(InputError, match=r"logits \[4, 9, 50\] and labels \[4, 8\].*each row of logits, \[4, 9\]"):
        summed_cross_entropy(logits, labels[:, 1:])
    with pytest.raises(IndexError):
        summed_cross_entropy(logits, torch.full_like(labels, 50))
    with pytest.raises(IndexError):
        summed_cross_entropy(logits, torch.full_like(labels, -1))
