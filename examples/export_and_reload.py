"""Export a rewritten model, and run it in a new process that knows only torch and kreg.

Two files are made. One has the kernels of this device. The other is portable: its ops have no kernels yet,
and `kreg.lower` chooses them where it is loaded.

    python examples/export_and_reload.py [folder]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from deepseek_v4 import model_and_inputs

import kreg

ELSEWHERE = """
import sys
import torch
import kreg

folder = sys.argv[1]
inputs, expected = torch.load(f"{folder}/expected.pt")

program = torch.export.load(f"{folder}/cpu.pt2")
(logits,) = program.module()(**inputs)
print("cpu.pt2 gives the same numbers:", torch.equal(logits, expected))

portable = torch.export.load(f"{folder}/portable.pt2")
lowered = kreg.lower(portable, "cpu")
(logits,) = lowered.module()(**inputs)
print("portable.pt2, lowered here, gives the same numbers:", torch.equal(logits, expected))
print("its kernels:", ", ".join(sorted({site.kernel for site in kreg.program_report(lowered).sites})))

print("transformers was imported:", "transformers" in sys.modules)
"""


def main(folder: Path) -> None:
    model, inputs = model_and_inputs()
    inputs["return_dict"] = False  # a tuple, not an output class of transformers

    program = kreg.export(model, inputs, device="cpu")
    torch.export.save(program, folder / "cpu.pt2")
    kreg.program_report(program).print()

    portable = kreg.export(model, inputs, portable=True)
    torch.export.save(portable, folder / "portable.pt2")

    with torch.no_grad():
        (expected,) = program.module()(**inputs)
    torch.save((inputs, expected), folder / "expected.pt")

    print("\nin a new process:", flush=True)
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(folder)], check=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
