"""What a catalogue holds, as a value: adding to it makes a new one, and checks the names it refers to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from kreg.errors import SpecError
from kreg.registry.calls import facts_names
from kreg.registry.constraints import Constraint
from kreg.registry.op import Op
from kreg.registry.ops.to_come import OPS_TO_COME
from kreg.registry.sources import Item
from kreg.registry.spec import KernelSpec
from kreg.registry.wording import did_you_mean, listing


@dataclass(frozen=True)
class Contents:
    """What a catalogue holds at one moment. Adding makes a new one, so that a failure adds nothing."""

    ops: Mapping[str, Op] = field(default_factory=dict)
    specs: Mapping[str, KernelSpec] = field(default_factory=dict)
    where: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def plus(self, items: Iterable[Item], where: str, to_come: Collection[str] = ()) -> Contents:
        """With further items, ops first; their specs may be of ops ``to_come``, which have no contract yet.

        Exclusions are not checked yet: they may name what comes later.
        """
        contents = self
        for item in sorted(items, key=lambda item: isinstance(item, KernelSpec)):
            contents = contents._with_op(item, where) if isinstance(item, Op) else contents._with(item, where, to_come)
        return contents

    def _with_op(self, op: Op, where: str) -> Contents:
        if self.ops.get(op.name) is op:
            return self
        self._check_free("op", op.name, where)
        check_op(op, where)
        if op.name in OPS_TO_COME:  # else kernels that are declared for kreg's own would be called as this one's
            raise SpecError(f"{where}: op {op.name!r}: kreg has kept this name for an op to come: give it another")
        return replace(self, ops={**self.ops, op.name: op}, where={**self.where, ("op", op.name): where})

    def _with(self, spec: KernelSpec, where: str, to_come: Collection[str]) -> Contents:
        self._check_free("kernel", spec.name, where)
        if spec.op not in self.ops and spec.op not in to_come:
            hint = hint_of(spec.op, {*self.ops, *to_come})
            raise SpecError(f"{where}: kernel {spec.name!r}: field 'op' is {spec.op!r}, not a registered op{hint}")
        names = facts_names(self.ops[spec.op]) if spec.op in self.ops else ()
        for number, text in enumerate(spec.constraints):
            try:
                Constraint.parse(text, names)
            except SpecError as error:
                field = f"{where}: kernel {spec.name!r}: field 'constraints.{number}'"
                raise SpecError(f"{field}: {error}") from None
        grown = {**self.specs, spec.name: spec}
        return replace(self, specs=grown, where={**self.where, ("kernel", spec.name): where})

    def _check_free(self, kind: str, name: str, where: str) -> None:
        first = self.where.get((kind, name))
        if first is not None:
            raise SpecError(
                f"{where}: {kind} {name!r} is registered already, by {first}: every {kind} needs its own name"
            )

    def dangling(self) -> Iterator[tuple[str, str]]:
        """Exclusions of what does not exist: where they are declared, and the complaint."""
        tags = {tag for spec in self.specs.values() for tag in spec.tags}
        for spec in self.specs.values():
            for name in spec.excludes:
                tag = name.startswith("tag:")
                wanted, known = name.removeprefix("tag:"), tags if tag else set(self.specs)
                if wanted in known and name != spec.name:
                    continue
                what = "a tag that no kernel has" if tag else "which no kernel is called"
                hint = ", itself" if name == spec.name else f", {what}{hint_of(wanted, known)}"
                where = self.where["kernel", spec.name]
                yield where, f"{where}: kernel {spec.name!r}: field 'excludes' has {name!r}{hint}"

    def checked(self) -> Contents:
        """Itself, once every exclusion is of something that exists."""
        complaints = [complaint for _, complaint in self.dangling()]
        if complaints:
            raise SpecError("\n".join(complaints))
        return self


def hint_of(name: str, known: Iterable[str]) -> str:
    """The nearest known name, and all of them."""
    return f"{did_you_mean(name, known)}. Known: {listing(sorted(known))}"


def check_op(op: Op, where: str) -> None:
    """Refuse an op whose tables do not fit its schema.

    Raises:
        SpecError: they do not.
    """
    for table, names, known in (
        ("tensors", op.tensors, op.arguments),
        ("differentiable", op.differentiable, tuple(op.tensors)),
    ):
        for name in names:
            if name not in known:
                hint = hint_of(name, known)
                raise SpecError(f"{where}: op {op.name!r}: field {table!r} has {name!r}{hint}")


def largest_sound(contents: Contents, found: Mapping[str, tuple[Item, ...]]) -> tuple[Contents, list[str]]:
    """Contents with every contribution that fits, and why the others do not.

    Leaving one out may leave an exclusion of another without its kernel, hence the repetition.
    """
    remaining, refused = dict(found), list[str]()
    while True:
        grown, complaints = contents, dict[str, str]()
        for where, items in remaining.items():
            try:
                grown = grown.plus(items, where)
            except SpecError as error:
                complaints[where] = str(error)
        complaints = complaints or {where: text for where, text in grown.dangling() if where in remaining}
        if not complaints:
            return grown, refused
        refused.extend(complaints.values())
        remaining = {where: items for where, items in remaining.items() if where not in complaints}
