"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

MODEL_HELP = "A folder with a config.json, a .pt2 file, or package.module:function."

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Write JSON to standard output, and nothing else.")]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, npu, or what torch names. Default: where the model is."),
]
SeqLen = Annotated[
    int | None,
    typer.Option("--seq-len", min=1, help="Tokens in the example input. Default: 512.", show_default=False),
]
Batch = Annotated[
    int | None,
    typer.Option(
        "--batch",
        min=1,
        help="Sequences in the example input. Default: 1; 2 with --dynamic.",
        show_default=False,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16, float16 or float64. Default: what the model says."),
]
Dynamic = Annotated[bool, typer.Option("--dynamic", help="Make batch and sequence dynamic, where the model allows it.")]
Enable = Annotated[
    list[str] | None,
    typer.Option("--enable", metavar="KERNEL", help="Prefer a kernel, or a pattern such as 'mindspeed.*'. Repeatable."),
]
Disable = Annotated[
    list[str] | None,
    typer.Option("--disable", metavar="KERNEL", help="Leave a kernel or a pattern out. Repeatable."),
]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Do not run each site old against new.")]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Plan from the specs alone, as if the device and all packages were there; replace nothing.",
    ),
]
