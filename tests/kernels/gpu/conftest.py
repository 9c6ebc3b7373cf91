"""Where the tests of GPU kernels run. That Triton interprets where there is no GPU is said in ``tests/conftest.py``."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """Where Triton's kernels run: on a GPU, or interpreted on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
