"""MindSpeed's stand-in on the path."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if find_spec("torch_npu") is not None:  # elsewhere these tests are skipped, and MindSpeed is not to be found
    sys.path.insert(0, str(Path(__file__).parents[1] / "stand_ins"))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """On inputs this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
