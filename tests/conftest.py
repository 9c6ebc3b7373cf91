"""What all tests share: ``tests.models`` importable from anywhere, one thread for inputs this small.

Triton interprets its kernels where there is no GPU. It decides so when it is imported, which Dynamo does: so it is told
here, before any test module is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """On inputs this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
