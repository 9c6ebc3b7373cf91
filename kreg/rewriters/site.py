"""A site: one place in one graph where a rule holds, with everything needed to replace it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from kreg.registry.op import Op
from kreg.rewriters.graph import aten, dtype_of, module_path, source_line

Call = tuple[Any, tuple[Any, ...]]
"""An operator to apply, with its further positional arguments: constants, an `Operand`, lists with an `Extent`."""

Calls = tuple[Call, ...]
"""Operators to apply one after the other."""


def positional(target: Any, value: Any, args: Sequence[Any]) -> tuple[Any, ...]:
    """All arguments of a call: what it is applied to comes first, in the list of what is joined where it joins."""
    return ([value, *args[0]], *args[1:]) if target is aten.cat.default else (value, *args)


class Refused(Exception):
    """A proof obligation that does not hold, in words, and the node it fails at."""

    def __init__(self, reason: str, node: Node | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node


@dataclass(frozen=True)
class Extent:
    """The size of a node's dimension, as an argument."""

    node: Node
    dim: int


@dataclass(frozen=True)
class Operand:
    """A tensor argument: a node of the captured graph, and how to bring it into the op's layout.

    ``levels`` are the only values that the node's tensor holds, where they are known; ``same`` are other nodes that
    hold the same tensor; ``follows`` says that it is made of what the site's own code reads, too, so that it has no
    values of its own.
    """

    node: Node
    calls: Calls = ()
    levels: tuple[float, ...] = ()
    same: tuple[Node, ...] = ()
    follows: bool = False

    def cast(self, dtype: torch.dtype) -> Operand:
        """The same operand in another dtype."""
        return self if dtype_of(self.node) == dtype else self.then(aten.to.dtype, dtype)

    def then(self, target: Any, *args: Any) -> Operand:
        """The same operand with one more call."""
        return replace(self, calls=(*self.calls, (target, args)))

    def value(self, values: Mapping[Node, Any]) -> torch.Tensor:
        """The operand itself, from the values of the nodes that it reads."""

        def fill(argument: Any) -> Any:
            if isinstance(argument, Operand):
                return argument.value(values)
            if isinstance(argument, Extent):
                return values[argument.node].shape[argument.dim]
            return [fill(part) for part in argument] if isinstance(argument, list) else argument

        value: torch.Tensor = values[self.node]
        for target, args in self.calls:
            value = target(*positional(target, value, [fill(argument) for argument in args]))
        return value

    @property
    def parts(self) -> Iterator[Operand]:
        """This operand, and those that its calls take."""
        yield self
        for part in tree_leaves([args for _, args in self.calls]):
            if isinstance(part, Operand):
                yield from part.parts
            elif isinstance(part, Extent):
                yield Operand(part.node)

    @property
    def nodes(self) -> Iterator[Node]:
        """Every node of the captured graph that is read."""
        yield from (part.node for part in self.parts)


@dataclass(frozen=True)
class Output:
    """A node of the captured graph that the op's result number ``position`` replaces, after ``calls``."""

    node: Node
    position: int
    calls: Calls = ()


@dataclass(frozen=True)
class Claim:
    """A tensor that the model masks with, in the op's [batch, heads, queries, keys], 1 where it does not vary.

    Attributes:
        operand: boolean, True where a key is kept; or additive, 0 there. None where no tensor could be named.
        levels: the values of an additive one that were read in the graph; none for a boolean one.
        of: "keys" is such a mask; "scores" all that the model adds to the product of queries and keys, masks or not;
            "causal" the mask that PyTorch's fused operator makes by itself, of which there is no tensor.
        leaves: the tensors that what was read is made of: it was read for any values of theirs.
    """

    operand: Operand | None
    levels: tuple[float, ...] = ()
    of: Literal["keys", "scores", "causal"] = "keys"
    leaves: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Mask:
    """What was proven about a site's mask, for the report: its kind, and the values that make it up."""

    kind: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report's form."""
        return {"kind": self.kind, **self.facts}


@dataclass(frozen=True, eq=False)
class Site:
    """Where an op was recognised.

    Attributes:
        op: the op's contract.
        anchor: the node that the rule started from.
        operands: tensor arguments by name; absent optional ones are left out.
        attributes: the other arguments by name; a Node where the value is a symbolic size.
        outputs: what the op's results replace.
        mask: what was proven about the mask, where the op has one.
        claims: the tensors that it was proven of.
    """

    op: Op
    anchor: Node
    operands: Mapping[str, Operand]
    attributes: Mapping[str, Any]
    outputs: tuple[Output, ...]
    mask: Mask | None = None
    claims: tuple[Claim, ...] = ()

    @property
    def id(self) -> str:
        """Unique in its graph and stable from run to run."""
        return f"{self.op.name}@{self.anchor.name}"

    @property
    def module(self) -> str:
        """Path of the module that computed the site's result."""
        return module_path(self.anchor)

    @property
    def trains(self) -> bool:
        """Whether gradients flow through the site's results."""
        return any(output.node.meta.get("trains", False) for output in self.outputs)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first operand: the one that kernels are chosen by."""
        first = next(iter(self.operands.values()))
        for target, args in reversed(first.calls):
            if target is aten.to.dtype:
                return args[0]  # type: ignore[no-any-return]
        return dtype_of(first.node)


@dataclass(frozen=True)
class NearMiss:
    """An anchor without a site: which op it looked like, where it is, and the obligation that failed."""

    op: str
    anchor: Node
    reason: str
    node: Node | None = None

    @property
    def is_given_out(self) -> bool:
        """Whether it fails at what the graph gives out: in a larger graph it may hold."""
        at = self.node or self.anchor
        return at.op == "output" or any(user.op == "output" for user in at.users)

    def to_json(self) -> dict[str, Any]:
        """The report's form."""
        at = self.node or self.anchor
        line = source_line(at)
        return {
            "op": self.op,
            "module": module_path(self.anchor),
            "node": at.name,
            "reason": f"{self.reason} ({line})" if line else self.reason,
        }
