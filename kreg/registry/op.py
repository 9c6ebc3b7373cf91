"""The contract of an op: what is computed, on no device in particular."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from kreg.errors import SpecError

Arguments = Mapping[str, Any]
"""The arguments of one call of an op, by name."""

Dims = Mapping[str, Any]
"""Sizes by dimension name: Python ints, or SymInts while tracing."""


@dataclass(frozen=True)
class Tolerance:
    """Largest accepted error, ``atol + rtol * max|expected|``, against a float64 reference."""

    rtol: float
    atol: float

    def accepts(self, error: float, scale: float) -> bool:
        """Whether an absolute error is within tolerance for values as large as ``scale``; NaN never is."""
        return error <= self.atol + self.rtol * scale


DEFAULT_TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-9, 1e-10),
    torch.float32: Tolerance(2e-5, 2e-6),
    torch.bfloat16: Tolerance(2e-2, 2e-3),
    torch.float16: Tolerance(4e-3, 4e-4),
}


def largest_difference(arguments: Arguments, got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> float:
    """Largest absolute difference of the first output; NaN on one side only counts as infinite."""
    a, b = got[0].detach().double(), want[0].detach().double()
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    if a.numel() == 0:
        return 0.0
    difference = (a - b).abs().nan_to_num(nan=0.0, posinf=float("inf"))
    same = (a == b) | (a.isnan() & b.isnan())  # equal infinities
    return float(difference.masked_fill(same, 0.0).max())


def normal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Random values for one argument: standard normal for floating point, coin flips for booleans."""
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) < 0.8
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Op:
    """What is computed: a contract that kernels fulfil and rules recognise.

    Attributes:
        name: operator name; the op is ``torch.ops.kreg.<name>``.
        summary: one line for ``kreg list``.
        schema: ``torch.library`` schema of arguments and results, without the name. A last keyword argument
            ``str kernel`` is added by the library: it names the kernel that computes the call, "" for the
            reference.
        tensors: for each tensor argument its named dimensions, as ``"batch heads queries head_dim"``.
        differentiable: the tensor arguments that receive a gradient.
        no_gradient: results that autograd takes for constants: what the backward is given to start from.
        reference: slow and obvious plain PyTorch with the schema's arguments; differentiable by autograd;
            accumulates in the dtype it is given, float32 at least.
        fake: results of the right shape, dtype and strides from (fake) arguments, computing nothing.
        samples: yields argument dicts for tests, edges included: ``samples(dtype, generator)``.
        work: ``work(dims, attributes) -> (floating-point operations, bytes moved)`` of one call, for costs.
        fill: random values for one argument while a site is verified, where normal ones would not be valid:
            ``fill[name](shape, dtype, generator, arguments so far)``.
        error: how far two results are apart; ``error(arguments, got, want)``, in units of the result.
        tolerances: accepted error per dtype, float64 being the judge.
        source: paper, equation or upstream function.
    """

    name: str
    summary: str
    schema: str
    tensors: Mapping[str, str]
    differentiable: tuple[str, ...]
    reference: Callable[..., tuple[torch.Tensor, ...]]
    fake: Callable[..., tuple[torch.Tensor, ...]]
    samples: Callable[[torch.dtype, torch.Generator], Iterator[dict[str, Any]]]
    work: Callable[[Dims, Arguments], tuple[float, float]]
    fill: Mapping[str, Callable[..., torch.Tensor]] = field(default_factory=dict)
    error: Callable[[Arguments, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]], float] = largest_difference
    tolerances: Mapping[torch.dtype, Tolerance] = field(default_factory=lambda: DEFAULT_TOLERANCES)
    source: str = ""
    no_gradient: tuple[str, ...] = ()

    @cached_property
    def parsed(self) -> torch._C.FunctionSchema:
        """The schema, parsed by torch. Raises SpecError where torch rejects it."""
        try:
            return torch._C.parse_schema(f"{self.name}{self.schema}")
        except RuntimeError as error:
            raise SpecError(f"op {self.name!r}: torch rejects its schema {self.schema!r}: {error}") from error

    @cached_property
    def arguments(self) -> tuple[str, ...]:
        """Names of all arguments in order."""
        return tuple(a.name for a in self.parsed.arguments)

    @cached_property
    def attributes(self) -> tuple[str, ...]:
        """Names of the arguments that are not tensors."""
        return tuple(name for name in self.arguments if name not in self.tensors)

    @cached_property
    def optional(self) -> tuple[str, ...]:
        """Names of the tensor arguments that may be absent."""
        kinds = {a.name: a.type.kind() for a in self.parsed.arguments}
        return tuple(name for name in self.tensors if kinds[name] == "OptionalType")

    @cached_property
    def defaults(self) -> Mapping[str, Any]:
        """Default values by argument name, where the schema has one."""
        return {a.name: a.default_value for a in self.parsed.arguments if a.has_default_value()}

    def constant_results(self, results: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Those of a call's results that pass no gradient on."""
        pairs = zip(self._constant, results, strict=True)
        return [t for constant, t in pairs if constant or not t.is_floating_point()]

    @cached_property
    def _constant(self) -> tuple[bool, ...]:
        return tuple(result.name in self.no_gradient for result in self.parsed.returns)

    @cached_property
    def outputs(self) -> int:
        """Number of results."""
        return len(self.parsed.returns)

    def dims(self, arguments: Arguments) -> dict[str, Any]:
        """Sizes by dimension name, read off the tensors' shapes; a name starting with ``1|`` may broadcast.

        Raises:
            ValueError: a tensor of the wrong rank, or two tensors that disagree about a dimension.
        """
        sizes: dict[str, Any] = {}
        for name, names in self.tensors.items():
            tensor = arguments.get(name)
            if tensor is None:
                continue
            parts = names.split()
            if tensor.dim() != len(parts):
                raise ValueError(f"{self.name}: {name} should be [{', '.join(parts)}], got shape {list(tensor.shape)}")
            for part, size in zip(parts, tensor.shape, strict=True):
                dim = part.removeprefix("1|")
                if part != dim and size == 1:
                    continue
                if isinstance(size, int) and isinstance(sizes.get(dim), int) and sizes[dim] != size:
                    raise ValueError(f"{self.name}: {dim} is {sizes[dim]}, but {name} has {size} there")
                sizes.setdefault(dim, size)
        return sizes
