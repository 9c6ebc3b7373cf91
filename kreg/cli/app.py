"""The application: its commands, and what holds for all of them."""

from __future__ import annotations

from typing import Annotated

import typer

from kreg.cli.bench import bench
from kreg.cli.catalogue import list_kernels, show
from kreg.cli.doctor import doctor
from kreg.cli.explain import explain
from kreg.cli.rewrite import rewrite
from kreg.cli.verify import verify
from kreg.version import __version__

COMMANDS = (
    ("list", list_kernels),
    ("show", show),
    ("rewrite", rewrite),
    ("explain", explain),
    ("verify", verify),
    ("bench", bench),
    ("doctor", doctor),
)
"""In the order of ``kreg --help``."""

HELP = (
    "Finds attention, indexers and other costly subgraphs in a PyTorch model, proves what each computes, and "
    "puts the best registered kernel in its place.\n\n"
    "A MODEL is a folder with a Hugging Face config.json (built with random weights; nothing is downloaded), "
    "a .pt2 file, or package.module:function, which returns (model, example_inputs)."
)
EPILOG = (
    "Exit codes: 0 done; 1 a site failed verification, or kreg itself failed; 2 bad input; "
    "3 nothing was replaced; 4 the model could not be captured. KREG_DEBUG=1 shows tracebacks."
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kreg {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="kreg",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(help=HELP, epilog=EPILOG)
def _kreg(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


for _name, _command in COMMANDS:
    app.command(_name)(_command)


def main() -> None:
    """The console script ``kreg``."""
    app()
