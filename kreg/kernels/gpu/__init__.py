"""What kreg's Triton kernels share: targets and their limits, tuning tables, launches, and builds without a GPU."""

from kreg.kernels.gpu.launch import Launch, launch, record
from kreg.kernels.gpu.tables import Config, Table
from kreg.kernels.gpu.targets import COMPILED, TARGETS, Target, current_target

__all__ = ["COMPILED", "TARGETS", "Config", "Launch", "Table", "Target", "current_target", "launch", "record"]
