"""The dialect of both front ends: nothing is written, and values and gradients are those of the original code."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch._functorch.aot_autograd import aot_export_module
from torch._ops import OpOverload
from torch.fx import GraphModule

import kreg
from kreg.rewriters import functional
from kreg.rewriters.functional import ONE_NAME, Signature, functionalize, normalize, without_idle_dropout
from kreg.rewriters.graph import aten, module_path

Function = Callable[..., Any]


def compiled(function: Function, dynamic: bool = False) -> tuple[Function, list[tuple[GraphModule, Signature]]]:
    """The function as its functional graph answers it, and that graph and its signature when it was called."""
    found: list[tuple[GraphModule, Signature]] = []

    def backend(module: GraphModule, _: Any) -> Function:
        fakes = [node.meta["example_value"] for node in module.graph.nodes if node.op == "placeholder"]
        made, signature = functionalize(module, fakes)
        found.append((made, signature))
        assert (calls(made), signature) == two_passes(module, fakes)

        def run(*inputs: Any) -> Any:
            results = made(*inputs)
            for position, value in zip(signature.written, results, strict=False):
                inputs[position].copy_(value)
            return tuple(results[len(signature.written) :])

        return run

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True), found


def calls(module: GraphModule) -> list[Any]:
    """The operators in order, but for those that only read or compute sizes."""
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert not any(target._schema.is_mutable for target in targets if isinstance(target, OpOverload))
    return [target for target in targets if target not in SIZES]


SIZES = {aten.sym_size.int, aten.sym_numel.default, operator.mul, operator.add, operator.floordiv}


def two_passes(module: GraphModule, fakes: Sequence[Any]) -> tuple[list[Any], Signature]:
    """What PyTorch's own two passes make of a graph."""
    whole, signature = aot_export_module(without_idle_dropout(module), fakes, trace_joint=False, pre_dispatch=True)
    assert isinstance(whole, GraphModule)
    normalize(whole)
    written = [signature.user_inputs.index(name) for name in signature.user_inputs_to_mutate.values()]
    return calls(whole), Signature(tuple(written))


def copies(inputs: Sequence[Any]) -> list[Any]:
    return [value.detach().clone().requires_grad_(value.requires_grad) for value in inputs]


def check(function: Function, *inputs: torch.Tensor, dynamic: bool = False) -> tuple[GraphModule, Signature]:
    """Outputs, new values of inputs, and gradients, by the functional graph and by the function itself."""
    again, found = compiled(function, dynamic)
    results = []
    for call in (function, again):
        torch.manual_seed(0)
        given = copies(inputs)
        outputs = torch.utils._pytree.tree_leaves(call(*given))
        trained = [value for value in given if value.requires_grad]
        loss = sum((o * torch.arange(1, o.numel() + 1).view(o.shape)).sum() for o in outputs if trains(o))
        gradients = torch.autograd.grad(loss, trained, allow_unused=True) if trained and trains(loss) else []
        results.append((outputs, given, gradients))
    torch._dynamo.reset()
    for want, got in zip(*results, strict=True):
        assert len(want) == len(got)
        for expected, value in zip(want, got, strict=True):
            if isinstance(expected, torch.Tensor):
                assert expected.dtype == value.dtype and torch.equal(expected, value)
            else:
                assert expected == value
    return found[0]


def trains(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def tensor(*shape: int, seed: int = 0, trains: bool = True) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(trains)


@pytest.fixture
def without_functional_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("functional tensors were used")

    monkeypatch.setattr(functional, "_traced_functional", refuse)


def views(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    q = (x @ w).reshape(x.shape[0], -1, 2).transpose(0, 1).contiguous().flatten(1).float()
    a, b = q.chunk(2)
    return torch.cat([a.to(torch.float64), b.double()]).softmax(-1)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
@pytest.mark.usefixtures("without_functional_tensors")
def test_a_graph_that_writes_nothing_is_traced_without_functional_tensors(dynamic: bool) -> None:
    made, _ = check(views, tensor(6, 4), tensor(4, 8, seed=1), dynamic=dynamic)
    composite = {aten.reshape.default, aten.contiguous.default, aten.flatten.using_ints, aten.to.dtype}
    assert not composite & {node.target for node in made.graph.nodes}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
@pytest.mark.usefixtures("without_functional_tensors")
def test_a_write_into_a_tensor_of_the_graphs_own_becomes_the_operator_that_returns(dynamic: bool) -> None:
    def scattered(x: torch.Tensor) -> torch.Tensor:
        order = x.detach().sum(-1).argsort()
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        out = torch.zeros_like(x)
        out.index_add_(0, order, x * 2)
        out.mul_(3.0)
        return out[inverse]

    made, _ = check(scattered, tensor(7, 3), dynamic=dynamic)
    assert {aten.index_put.default, aten.index_add.default} <= {node.target for node in made.graph.nodes}


def test_a_write_through_a_view_reaches_the_tensor_and_its_other_views() -> None:
    def through(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x * 2
        row, column = y[0], y[:, 1]
        row.add_(column.sum())
        return y, column * row.sum()

    check(through, tensor(4, 3))


def test_a_write_that_another_name_reads_afterwards_reaches_it() -> None:
    def aliased(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x * 3
        flat = y.view(-1)
        y.mul_(2)
        return flat * 1, y

    check(aliased, tensor(4, 3))


def test_a_view_that_is_no_longer_read_does_not_need_functional_tensors(without_functional_tensors: None) -> None:
    def unread(x: torch.Tensor) -> torch.Tensor:
        y = x * 3
        total = y.view(-1).sum()
        return y.mul_(2) + total

    check(unread, tensor(4, 3))


def test_a_write_that_keeps_the_dtype_of_what_it_writes_keeps_it() -> None:
    def rounded(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x * 1).add_(y)

    made, _ = check(rounded, tensor(4, 3), tensor(4, 3, seed=1).double().detach())
    (output,) = (node for node in made.graph.nodes if node.op == "output")
    assert output.args[0][0].meta["val"].dtype == torch.float32


def test_a_write_into_a_tensor_of_other_strides_gives_the_same_values() -> None:
    def transposed(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = torch.empty_strided((4, 3), (1, 4))
        z.copy_(x)
        z.add_(y)
        return z.reshape(-1)

    check(transposed, tensor(4, 3), tensor(4, 3, seed=1))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
def test_new_values_of_inputs_come_first_in_the_order_of_the_inputs(dynamic: bool) -> None:
    def writes(x: torch.Tensor, mean: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        seen += 1
        mean[: len(x)].mul_(0.5).add_(x.detach().mean(-1))
        return x * mean[: len(x)].unsqueeze(-1).clone()

    _, signature = check(writes, tensor(4, 3), tensor(6, trains=False), torch.zeros(()), dynamic=dynamic)
    assert len(signature.written) == 2 and list(signature.written) == sorted(signature.written)


def test_outputs_may_be_inputs_views_of_inputs_and_numbers() -> None:
    def mixed(x: torch.Tensor, y: torch.Tensor) -> tuple[Any, ...]:
        return x, y.t(), x.view(-1), y * 2, x.shape[0] * 2

    check(mixed, tensor(4, 3), tensor(5, 2, seed=1), dynamic=True)


def test_sizes_come_in_and_go_out() -> None:
    def count(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        return x.sum(), x.shape[0] // 2 + 1, x.numel()

    check(count, tensor(9, 3), dynamic=True)


def test_gradients_stop_where_they_stopped_and_the_graph_says_where() -> None:
    def stopped(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = x.abs().amax() + 1
        return x / scale + y.detach() * y

    made, _ = check(stopped, tensor(4, 3), tensor(4, 3, seed=1))
    switches = [node.args[0] for node in made.graph.nodes if node.target is torch._C._set_grad_enabled]
    assert switches == [False, True]
    assert [node.target for node in made.graph.nodes if node.meta.get("cut")].count(aten.detach.default) == 1


def test_autocast_stays_in_the_graph() -> None:
    def cast(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = x @ w
        return y * 2

    check(cast, tensor(4, 3), tensor(3, 5, seed=1))


def test_random_operators_draw_what_they_drew() -> None:
    def noisy(x: torch.Tensor) -> torch.Tensor:
        mask = torch.empty_like(x).bernoulli_(0.5)
        return nn.functional.dropout(x, 0.3, True) * mask + torch.rand_like(x)

    check(noisy, tensor(8, 8))


def test_dropout_that_is_off_is_not_in_the_graph() -> None:
    made, _ = check(lambda x: nn.functional.dropout(x * 2, 0.3, False) + 1, tensor(4, 3))
    assert aten.dropout.default not in {node.target for node in made.graph.nodes}


def test_constants_made_in_the_code_are_in_the_graph() -> None:
    check(lambda x: x * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor(5.0), tensor(4, 3))


def test_an_exported_program_with_switches_of_its_own_is_one_graph() -> None:
    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(tensor(3, 3).detach())
            self.seen = nn.Buffer(torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                angle = torch.arange(3).float().cos()
            with torch.autocast("cpu", torch.bfloat16):
                y = x @ self.weight
            self.seen += 1
            return y.float() * angle * torch.tensor(2.0)

    model = Switched()
    program = torch.export.export(copy.deepcopy(model), (tensor(4, 3, trains=False),), strict=False)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    values = [node.meta["val"] for node in placeholders]
    made, signature = functionalize(program.graph_module, values)
    assert (calls(made), signature) == two_passes(program.graph_module, values)
    assert not [node for node in made.graph.nodes if isinstance(node.target, torch._ops.HigherOrderOperator)]
    names = [spec.target for spec in program.graph_signature.input_specs]
    assert [names[i] for i in signature.written] == ["seen"]
    x = tensor(4, 3, seed=2)
    ours = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    known = {**ours, **program.constants, "seen": model.seen}
    seen, out = made(*[known[name] if name else x for name in names])
    assert float(seen) == 1.0
    want = model(x)
    assert torch.equal(out, want)
    grads = torch.autograd.grad(out.sum(), list(ours.values())), torch.autograd.grad(want.sum(), [model.weight])
    assert torch.equal(grads[0][0], grads[1][0])


def test_an_input_that_is_written_and_is_part_of_another_is_refused() -> None:
    base = torch.zeros(6)
    mode = torch._subclasses.FakeTensorMode()
    whole = mode.from_tensor(base)
    with mode:
        part = whole[:3]

    class Writing(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor]:
            return (x.add_(1).sum() + y.sum(),)

    with pytest.raises(RuntimeError, match="shares its memory with another input"):
        functionalize(torch.fx.symbolic_trace(Writing()), [whole, part])


def test_tensors_made_of_tensors_are_refused() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    module = torch.fx.symbolic_trace(nn.Softmax(-1))
    with pytest.raises(NotImplementedError, match="tensors made of tensors"):
        functionalize(module, [TwoTensor(tensor(4, 3), tensor(4, 3))])


def test_sizes_that_depend_on_data_are_joined_as_they_are() -> None:
    class Chosen(nn.Module):
        def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            return torch.cat([x[keep].flatten(), torch.empty(0), x[0]]).sin()

    inputs = torch.arange(12.0).reshape(4, 3), torch.tensor([True, False, True, False])
    program = torch.export.export(Chosen(), inputs, strict=False)
    made = kreg.lower(program, "cpu")
    assert torch.equal(made.module()(*inputs), Chosen()(*inputs))


def test_code_under_vmap_is_traced() -> None:
    class Mapped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.zeros_like(x).index_fill_(0, torch.tensor([1]), 2.0)
            return y * torch.vmap(lambda row: row.sum() * row)(x)

    model, x = Mapped(), tensor(4, 3, trains=False)
    program = torch.export.export(model, (x,), strict=False)
    fakes = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    made, signature = functionalize(program.graph_module, fakes)
    (got,) = made(*(program.constants[s.target] if s.target else x for s in program.graph_signature.input_specs))
    assert signature == Signature()
    assert torch.equal(got, model(x))


def test_a_trace_that_fails_leaves_gradients_on_and_vmap_off() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch._C._set_grad_enabled, (False,))
    graph.call_function(torch._functorch.predispatch._vmap_increment_nesting, (4, "error"))
    graph.output((graph.call_function(aten.view.default, (x, [-1, 7])),))
    with pytest.raises(RuntimeError, match="invalid for input of size 12"):
        functionalize(GraphModule(nn.Module(), graph), [torch._subclasses.FakeTensorMode().from_tensor(tensor(4, 3))])
    assert torch.is_grad_enabled()
    torch.rand(1)  # raises under vmap


def test_an_operator_of_two_names_is_called_by_one_of_them() -> None:
    def by_other_names(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        positive = torch.multiply(torch.absolute(x), torch.clip(torch.subtract(x, y, alpha=2), 0.5, 3.0))
        where = torch.logical_and(torch.greater(x, y), torch.not_equal(torch.negative(x), 0))
        return torch.concat([torch.divide(positive, 2, rounding_mode="floor"), where.to(x.dtype)], -1)

    graph, _ = check(by_other_names, tensor(3, 4), tensor(3, 4, seed=1))
    assert not {*calls(graph)} & ONE_NAME.keys()
    assert {aten.mul.Tensor, aten.abs.default, aten.clamp.default, aten.cat.default} <= {*calls(graph)}


def test_operators_that_are_called_by_another_name_take_the_same_arguments() -> None:
    def arguments(operator: OpOverload) -> list[tuple[str, str, object]]:
        return [(a.name, str(a.type), a.default_value) for a in operator._schema.arguments]

    for other, name in ONE_NAME.items():
        assert arguments(other) == arguments(name), other


class Inner(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.softmax(-1)


def test_modules_and_lines_of_the_code_are_kept_with_the_nodes() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * 2

    made, _ = check(Outer(), tensor(4, 3))
    (softmax,) = (node for node in made.graph.nodes if node.target is aten.softmax.int)
    assert "x.softmax(-1)" in softmax.meta["stack_trace"]
    ((path, of),) = [entry for entry in softmax.meta["nn_module_stack"].values() if "inner" in entry[0]]
    assert path.endswith("inner") and of.endswith("Inner")


def test_modules_and_lines_of_code_between_switches_are_kept_too() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Inner(), Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                y = self.first(x) * 2
            with torch.autocast("cpu", torch.bfloat16):
                return self.second(y) * x

    program = torch.export.export(Outer(), (tensor(4, 3),), strict=False)
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    made, _ = functionalize(program.graph_module, values)
    found = [node for node in made.graph.nodes if node.target is aten.softmax.int]
    assert [module_path(node) for node in found] == ["first", "second"]
    assert all("x.softmax(-1)" in node.meta["stack_trace"] for node in found)
