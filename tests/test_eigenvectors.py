"""Eigenvectors: exact, the same whichever way they are found, and found elsewhere where one device does not."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from tests.models import relative_error
from wherefrom.curvature.damping import Spectrum, damped_inverse
from wherefrom.curvature.eigen import Way, _own_stream, chosen_way, decomposed, eigenvectors
from wherefrom.runtime.errors import LossError

WAYS: tuple[Way, ...] = ("batched", "looped", "streams")


def test_eigenvalues_below_zero_are_rounding() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    exact = torch.tensor([-1e-7, -1e-12, 0.0, 1e-3, 1.0, 4.0], dtype=torch.float64)
    matrix = basis * exact @ basis.T
    assert float(torch.linalg.eigvalsh(matrix).min()) < -5e-8
    values, found = eigenvectors({"layer.activations": matrix}, torch.device("cpu"))["layer.activations"]
    assert torch.allclose(values, exact.clamp_min(0), atol=1e-12)
    assert values.min() >= 0
    assert torch.allclose(found.T @ found, torch.eye(6, dtype=torch.float64))
    # And a pseudo-inverse leaves these directions out.
    spectra = (Spectrum(torch.ones(1, dtype=torch.float64), True), Spectrum(values, True))
    assert damped_inverse(values.unsqueeze(0), 0.0, spectra).count_nonzero() == 3


def test_every_way_of_decomposing_finds_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wherefrom.curvature.eigen._EIGH_BYTES", 3 * 8 * 9**2)  # batches of three
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 20, 9, generator=generator)
    matrices = {f"{number}.activations": each.T @ each / 20 for number, each in enumerate(rows)}
    plain = {name: torch.linalg.eigh(each.double()) for name, each in matrices.items()}
    for way in WAYS:
        found = decomposed(matrices, torch.device("cpu"), way)
        assert list(found) == list(matrices)
        for name, (values, vectors) in found.items():
            assert torch.equal(values, plain[name].eigenvalues.float())
            assert torch.equal(vectors, plain[name].eigenvectors.float())
    cuda = torch.device("cuda")
    assert {chosen_way(9, size, torch.device("cpu")) for size in (3, 3072)} == {"batched"}
    assert (chosen_way(9, 8, cuda), chosen_way(9, 3072, cuda), chosen_way(1, 3072, cuda)) == (
        "batched",
        "streams",
        "looped",
    )


def test_what_one_device_does_not_decompose_the_cpu_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """cuSOLVER may fail on a matrix that LAPACK decomposes: here, on a device that holds no numbers."""
    exact = torch.linalg.eigh

    def failing(matrix: Tensor) -> object:
        if matrix.is_meta:
            raise RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED\nmore")
        return exact(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    torch.manual_seed(0)
    rows = torch.randn(2, 20, 5)
    covariances = {f"{number}.gradients": each.T @ each for number, each in enumerate(rows)}
    with caplog.at_level(logging.WARNING):
        found = eigenvectors(covariances, torch.device("meta"))
    for name, (values, vectors) in found.items():
        assert relative_error(vectors * values @ vectors.T, covariances[name]) < 1e-6
        assert f"{name}: its eigenvectors were not found on meta (cusolver error: CUSOLVER_STATUS" in caplog.text


def test_a_stream_begins_after_what_it_needs_and_ends_when_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Recorded:
        def __init__(self, device: torch.device) -> None:
            done.append(f"a stream of {device}")

        def wait_stream(self, other: str) -> None:
            done.append(f"waits for {other}")

        def synchronize(self) -> None:
            done.append("has done everything")

    monkeypatch.setattr(torch.cuda, "Stream", Recorded)

    def in_use(stream: Recorded) -> AbstractContextManager[None]:
        done.append("is in use")
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "stream", in_use)
    with _own_stream(torch.device("cuda", 1), "covariances"):  # type: ignore[arg-type]
        done.append("eigh")
    expected = ["a stream of cuda:1", "waits for covariances", "is in use", "eigh", "has done everything"]
    assert done == expected


def test_a_decomposition_that_fails_names_its_layer() -> None:
    """LAPACK gives up on a matrix that is not finite, and with it on its whole batch."""
    good, bad = torch.eye(3, dtype=torch.float64), torch.full((3, 3), torch.nan, dtype=torch.float64)
    for way in WAYS:
        with pytest.raises(LossError, match=r"Layer 'b\.c': the eigenvectors of .* gradients \[3, 3\] were not found"):
            decomposed({"a.activations": good, "b.c.gradients": bad}, torch.device("cpu"), way)
    with pytest.raises(LossError, match=r"Layer 'b\.c': its covariance is not finite"):
        eigenvectors({"a.activations": good, "b.c.gradients": bad}, torch.device("cpu"))
