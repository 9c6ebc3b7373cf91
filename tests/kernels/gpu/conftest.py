"""Triton interprets its kernels where there is no GPU; that is decided before a kernel's module is imported."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> str:
    """Where Triton's kernels run: on a GPU, or interpreted on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
