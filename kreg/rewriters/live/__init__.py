"""Live models: which modules are captured, how their masks were made, and the graphs that answer their calls."""

from kreg.rewriters.live.calls import analysed, attach, attached, detach, example_inputs_for

__all__ = ["analysed", "attach", "attached", "detach", "example_inputs_for"]
