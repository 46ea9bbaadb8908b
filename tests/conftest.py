"""Settings for all tests: nothing is fetched, and runs are repeatable."""

from __future__ import annotations

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests with the mark `gpu` need one."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is false: this test needs a GPU")
