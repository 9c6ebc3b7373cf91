"""Benchmarks: a rewritten model beside the original and ``torch.compile``, measured in turn in one process."""

from kreg.bench.depth import DepthResult, measure_depth
from kreg.bench.run import BASELINES, Case, Result, cases, run
from kreg.bench.steps import STEPS, WITH_CACHE, takes_cache

__all__ = [
    "BASELINES",
    "STEPS",
    "WITH_CACHE",
    "Case",
    "DepthResult",
    "Result",
    "cases",
    "measure_depth",
    "run",
    "takes_cache",
]
