"""``torch.compile(model, backend="kreg")``: by name alone, and with Inductor for what is left over."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.models import llama, tokens

ALONE = """
import sys, torch
from torch import nn

class Attention(nn.Module):
    def forward(self, q, k, v):
        return torch.softmax(q @ k.mT / 4.0, dim=-1) @ v

q, k, v = torch.randn(3, 2, 4, 8, 16).unbind()
assert "kreg" not in sys.modules
got = torch.compile(Attention(), backend="kreg")(q, k, v)
assert "kreg" in sys.modules
assert torch.allclose(got, Attention()(q, k, v), atol=1e-5)
from kreg.registry.calls import resolve
print(resolve.cache_info().currsize)
"""


def test_the_backend_is_found_by_its_name_in_a_process_that_never_imported_kreg() -> None:
    ended = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 0  # a kernel was looked up: something was replaced


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_compiles_what_kreg_does_not_replace_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx as inductor

    seen: list[set[str]] = []
    compile_fx = inductor.compile_fx

    def spy(module: torch.fx.GraphModule, *args: object, **kwargs: object) -> object:
        seen.append({str(node.target) for node in module.graph.nodes})
        return compile_fx(module, *args, **kwargs)

    monkeypatch.setattr(inductor, "compile_fx", spy)
    torch._dynamo.reset()
    model = llama(layers=1)
    inputs = {"input_ids": tokens(2, 16), "use_cache": False}

    def run(called: nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        logits = called(**inputs).logits
        logits.square().mean().backward()
        return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    compiled = torch.compile(model, backend="kreg", options={"verify": False, "rest": "inductor"})
    (got, gradients), (want, expected) = run(compiled), run(model)
    assert any("kreg.attention.default" in targets for targets in seen)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_rest_is_refused_with_what_there_is() -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match="one of eager, inductor; found 'triton'"):
        torch.compile(llama(layers=1), backend="kreg", options={"rest": "triton"})(input_ids=tokens(2, 16))
