"""Execution: how to compute, apart from what.

None of it is part of what a result is, but for half precision, which rounds: a result says with which it was made.
"""

from __future__ import annotations

from dataclasses import dataclass

from wherefrom.runtime.errors import InputError, check_argument


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a study computes; results depend on it only by rounding.

    Attributes:
        half_precision: bfloat16 products in the model's passes and resident query gradients in bfloat16; factors, and
            what is summed, stay float32.
        query_batch_size: queries a batch; found from the free memory by default.
        train_batch_size: training examples a batch; found from the free memory by default.
        memory_budget: GiB that may be taken on the model's device beyond the model and its factors; most of what is
            free by default.
        compile_activations: run the model's activation functions through torch.compile, which makes each pass through
            a model like GPT-2 a fifth faster after some seconds of compiling.
        offload_factors: keep covariances, eigenvectors and eigenvalues in the host's memory, and bring a layer's to the
            device when it is needed: slower, for models whose factors do not fit.
        checkpoint_seconds: how often a sweep may save its partial sums, so that it can be resumed; 0 is after every
            batch.
        progress: show progress bars; by default, when the standard error is a terminal.

    Raises:
        InputError: a batch size or the budget is not positive.
    """

    half_precision: bool = False
    query_batch_size: int | None = None
    train_batch_size: int | None = None
    memory_budget: float | None = None
    compile_activations: bool = False
    offload_factors: bool = False
    checkpoint_seconds: float = 60.0
    progress: bool | None = None

    def __post_init__(self) -> None:
        for name in ("query_batch_size", "train_batch_size"):
            size = getattr(self, name)
            check_argument(size is None or size >= 1, name, size, "at least 1, or None to find one")
        if self.memory_budget is not None and not 0 < self.memory_budget < 2**40:
            raise InputError(f"memory_budget={self.memory_budget}: expected a number of GiB above 0, or None.")

    @property
    def budget_bytes(self) -> int | None:
        """The memory budget in bytes."""
        return None if self.memory_budget is None else int(self.memory_budget * 2**30)
