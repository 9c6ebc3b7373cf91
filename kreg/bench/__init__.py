"""Benchmarks: a rewritten model beside the original and ``torch.compile``, measured in turn in one process."""

from kreg.bench.run import Case, Result, cases, run

__all__ = ["Case", "Result", "cases", "run"]
