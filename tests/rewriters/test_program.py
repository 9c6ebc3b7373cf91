"""Programs are ordinary ones: they save, load with ``import kreg`` alone, lower, train."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

import kreg
from kreg.rewriters import program
from kreg.rewriters.facts import op_nodes
from tests.models import CSA, deepseek_v4, llama, tokens

ROOT = Path(kreg.__file__).parents[1]


@cache
def made(name: str, portable: bool = False) -> tuple[nn.Module, ExportedProgram]:
    """A small model and its program, batch and sequence dynamic for llama."""
    if name == "llama":
        model = llama()
        inputs: dict[str, Any] = {"input_ids": tokens(2, 11)}
        return model, kreg.export(model, inputs, dynamic_shapes="auto", portable=portable)
    model = deepseek_v4((CSA,))
    return model, kreg.export(model, {"input_ids": tokens(2, 45)}, portable=portable)


def length_of(name: str) -> int:
    return 11 if name == "llama" else 45


LOADER = """
import sys
import torch
import kreg
assert "transformers" not in sys.modules
folder, names = sys.argv[1], sys.argv[2:]
for name in names:
    loaded = torch.export.load(f"{folder}/{name}.pt2")
    inputs = torch.load(f"{folder}/{name}-in.pt")
    with torch.no_grad():
        out = torch.utils._pytree.tree_leaves(loaded.module()(**inputs))[0]
    torch.save(out, f"{folder}/{name}-out.pt")
    kernels = {str(n.kwargs.get("kernel")) for n in loaded.graph.nodes if str(n.target).startswith("kreg.")}
    assert kernels and not kernels & {"", "None"}, kernels
    assert kreg.program_report(loaded).sites
assert "transformers" not in sys.modules
"""


def test_a_saved_program_gives_the_same_outputs_where_only_torch_and_kreg_are_imported(
    tmp_path: Path,
) -> None:
    names = ("llama", "deepseek_v4")
    for name in names:
        torch.export.save(made(name)[1], tmp_path / f"{name}.pt2")
        torch.save({"input_ids": tokens(2, length_of(name), seed=4)}, tmp_path / f"{name}-in.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path), *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in names:
        with torch.no_grad():
            want = made(name)[1].module()(input_ids=tokens(2, length_of(name), seed=4)).logits
        # a process of its own has its own number of threads, and so its own order of summation
        torch.testing.assert_close(torch.load(tmp_path / f"{name}-out.pt"), want, rtol=1e-5, atol=1e-5)


def test_a_portable_program_remembers_what_trains(tmp_path: Path) -> None:
    _, portable = made("llama", portable=True)
    torch.export.save(portable, tmp_path / "portable.pt2")
    for exported in (portable, program.load(tmp_path / "portable.pt2")):
        report = kreg.program_report(kreg.lower(exported, "cpu"))
        assert report is not None
        assert [site.trainable for site in report.sites] == [True, True]
        assert all(site.verify is not None and site.verify.max_grad_error is not None for site in report.sites)


def test_a_portable_program_names_no_kernel_until_it_is_lowered(tmp_path: Path) -> None:
    model, portable = made("deepseek_v4", portable=True)
    ops = list(op_nodes(portable.graph))
    assert {op.name for _, op in ops} >= {"sparse_attention", "lightning_indexer"}
    assert all("kernel" not in node.kwargs for node, _ in ops)
    torch.export.save(portable, tmp_path / "portable.pt2")
    loaded = program.load(tmp_path / "portable.pt2")
    lowered = kreg.lower(loaded, "cpu")
    kernels = {node.kwargs["kernel"] for node, _ in op_nodes(lowered.graph)}
    assert len(kernels) >= 2 and "" not in kernels
    ids = tokens(2, 45, seed=2)
    with torch.no_grad():
        want = model(ids).logits
        for exported in (portable, loaded, lowered):
            torch.testing.assert_close(exported.module()(input_ids=ids).logits, want, rtol=1e-4, atol=2e-5)


def test_a_program_that_was_exported_without_kreg_is_raised_when_it_is_lowered() -> None:
    model, ids = llama(), tokens(2, 9)
    plain = torch.export.export(model, (), {"input_ids": ids}, strict=False)
    lowered = kreg.lower(plain, "cpu")
    assert [op.name for _, op in op_nodes(lowered.graph)] == ["attention", "attention"]
    with torch.no_grad():
        torch.testing.assert_close(lowered.module()(input_ids=ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_exporting_leaves_the_model_as_it_was() -> None:
    model, ids = llama().train(), tokens(2, 9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kreg.export(model, {"input_ids": ids})
    assert model.training and model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("loaded", [False, True], ids=["exported", "loaded"])
def test_training_through_the_program_gives_every_gradient(loaded: bool, tmp_path: Path) -> None:
    model, exported = made("llama")
    if loaded:
        torch.export.save(exported, tmp_path / "m.pt2")
        exported = program.load(tmp_path / "m.pt2")
    ids = tokens(2, 11, seed=1)
    weights = torch.randn(2, 11, 64, generator=torch.Generator().manual_seed(0))
    module = exported.module()
    (module(input_ids=ids).logits * weights).sum().backward()
    wanted = dict(model.named_parameters())
    gradients = torch.autograd.grad((model(ids).logits * weights).sum(), list(wanted.values()))
    parameters = dict(module.named_parameters())
    for (name, _), gradient in zip(wanted.items(), gradients, strict=True):
        got = parameters[name].grad
        assert got is not None, name
        torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
        parameters[name].grad = None


def test_a_step_of_an_optimiser_changes_what_the_program_computes() -> None:
    model = llama()
    module = kreg.export(model, {"input_ids": tokens(2, 11)}).module()
    ids = tokens(2, 11, seed=1)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(module(input_ids=ids).logits.flatten(0, 1), ids.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize(("batch", "length"), [(1, 11), (2, 2), (5, 40), (2, 12), (3, 127)])
def test_a_dynamic_program_runs_at_other_sizes(batch: int, length: int) -> None:
    model, exported = made("llama")
    ids = tokens(batch, length)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(input_ids=ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


class Counting(nn.Module):
    """Attention that writes into a buffer at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Buffer(torch.zeros(()))
        self.mean = nn.Buffer(torch.zeros(8))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        out = torch.softmax(q @ k.transpose(-1, -2) * 0.3, dim=-1) @ v
        self.mean.mul_(0.5).add_(out.detach().mean((0, 1, 2)))
        return out


def test_buffers_that_the_model_writes_are_written_by_the_program() -> None:
    model, untouched = Counting(), Counting()
    q, k, v = (torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    exported = kreg.export(model, (q, k, v))
    assert [op.name for _, op in op_nodes(exported.graph)] == ["attention"]
    module = exported.module()
    for _ in range(3):
        torch.testing.assert_close(module(q, k, v), untouched(q, k, v), rtol=1e-4, atol=1e-6)
    assert float(module.seen) == 3.0
    torch.testing.assert_close(module.mean, untouched.mean, rtol=1e-4, atol=1e-6)


def test_a_program_of_a_newer_kreg_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as newer:
        newer.setattr(program, "FORMAT", program.FORMAT + 1)
        newer.setattr(program, "__version__", "9.8.7")
        exported = kreg.export(llama(), {"input_ids": tokens(2, 9)})
        torch.export.save(exported, tmp_path / "newer.pt2")
    with pytest.raises(kreg.ArtifactError, match=r"made by kreg 9\.8\.7.*pip install -U"):
        program.load(tmp_path / "newer.pt2")
    with pytest.raises(kreg.ArtifactError, match=r"kreg 9\.8\.7"):
        kreg.lower(torch.export.load(tmp_path / "newer.pt2"), "cpu")


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(kreg.ArtifactError, match=r"there is no file '.*nowhere\.pt2'"):
        program.load(tmp_path / "nowhere.pt2")


def test_a_file_that_is_no_archive_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "text.pt2").write_text("not a program")
    with pytest.raises(kreg.ArtifactError, match=r"is not a \.pt2 archive"):
        program.load(tmp_path / "text.pt2")


def test_an_archive_that_holds_no_program_gives_torchs_reason(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "empty.pt2", "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(kreg.ArtifactError, match=r"could not be loaded by torch"):
        program.load(tmp_path / "empty.pt2")


def test_a_program_holds_no_operator_that_another_library_defines() -> None:
    exported = kreg.export(deepseek_v4((CSA,)), {"input_ids": tokens(2, 45)})
    calls = [node.target for node in exported.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert {target.namespace for target in calls} == {"aten", "kreg"}
