"""The command line: ``kreg COMMAND``, also ``python -m kreg.cli``.

Exit codes, for scripts:

==== ==================================================================================
0    done
1    a site failed verification, or kreg itself failed
2    bad input: options, MODEL, unknown or conflicting kernels, a file of a newer kreg
3    nothing was replaced: nothing was found, or no kernel can be used
4    the model could not be captured
==== ==================================================================================

With ``--json`` standard output holds one JSON value and nothing else; an error is ``{"error": {...}}``. What
is being done, and warnings, go to standard error. ``KREG_DEBUG=1`` shows the traceback of an error.

A command is a function in a module of its own, and a line in `kreg.cli.app`. Modules here import nothing
heavy at the top: ``kreg --help`` and ``kreg list`` never import transformers.
"""

from kreg.cli.app import app, main

__all__ = ["app", "main"]
