"""What a graph makes of the places that a top-k picked: where they become -1, and what of them it can tell.

An op that picks promises a set. Which slot an entry is in is free, and, where nothing marks them, which entries fill
the slots that nothing ready is left for. So every value that is computed from the picks has to come to one in which
neither shows. The order does not show in an ``any`` or an exact sum over the slots of what is the same function of
every slot's entry. The choice does not show if that function is constant for entries that are not ready; or where it
is membership, ``any m: picks[m] == t``, beside the condition that entry t is ready.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from torch.fx import Node

from kreg.rewriters import notation as n
from kreg.rewriters.graph import aten, is_tensor, shape_of, users
from kreg.rewriters.lift import Index, Lifter
from kreg.rewriters.lift_ops import LAYOUT, POINTWISE
from kreg.rewriters.notation import Expr
from kreg.rewriters.site import Refused

ORDER, CHOICE = "the order", "the choice among those not ready"
WORST = ("", CHOICE, ORDER)

CHOICES = frozenset({aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.masked_fill.Scalar})


@dataclass(frozen=True)
class Member:
    """``any m: element[..., m] == place``: whether a place is named by one of a tensor's elements."""

    element: n.Load
    place: Expr


def member(condition: Expr) -> Member | None:
    """A condition as membership, whatever sentinel the model writes for "none"."""
    if not isinstance(condition, n.Reduce) or condition.kind != "any":
        return None
    found: list[Member] = []
    others: list[Expr] = []
    for part in n.conjuncts(condition.body):
        pair = _equal(part, condition.variable)
        found.extend([pair] if pair is not None else [])
        others.extend([part] if pair is None else [])
    if len(found) != 1 or found[0].element.index[-1:] != (condition.variable,):
        return None
    (only,) = found
    if any(condition.variable in i.variables for i in (*only.element.index[:-1], only.place)):
        return None
    return only if all(_follows(other, only) for other in others) else None


def _follows(condition: Expr, found: Member) -> bool:
    """Whether a bound on the element follows from its being the place, as ``element >= 0`` does."""
    match condition:
        case n.Apply("le0", (bound,)):
            c = n.parts(bound)[0].get(found.element, 0)
            return n.le0(n.add(bound, n.mul(n.Const(c), n.sub(found.place, found.element)))) == n.TRUE
    return False


def _equal(condition: Expr, slot: n.Var) -> Member | None:
    """``element == place`` for an element that depends on the slot, which the place does not."""
    match condition:
        case n.Apply("eq0", (difference,)):
            terms, _ = n.parts(difference)
            loads = [(atom, c) for atom, c in terms.items() if slot in atom.variables]
            if len(loads) == 1 and isinstance(loads[0][0], n.Load) and abs(loads[0][1]) == 1:
                element, c = loads[0]
                assert isinstance(element, n.Load)
                return Member(element, n.mul(n.Const(-c), n.sub(difference, n.mul(n.Const(c), element))))
    return None


def near(node: Node, depth: int) -> Iterator[Node]:
    """Light users of a node and of those, some steps far."""
    for user in users(node) if depth else ():
        yield user
        if is_light(user):
            yield from near(user, depth - 1)


def is_light(node: Node) -> bool:
    """Whether index notation can look into a node."""
    return node.target in POINTWISE or node.target in LAYOUT


def reaches(node: Node, target: object, depth: int) -> bool:
    """Whether a node is computed from a call of ``target``, some steps back, by what index notation can look into."""
    if node.target is target:
        return True
    return depth > 0 and is_light(node) and any(reaches(i, target, depth - 1) for i in node.all_input_nodes)


def marked(lifter: Lifter, picked: Node, index: Index, is_none: Callable[[Expr], bool]) -> Node | None:
    """The node where the picks at ``index`` become -1 under a condition, if nothing else reads the picks.

    Args:
        is_none: whether a condition is the one; what it refuses is another node's.
    """
    place = lifter.element(picked, index)
    for candidate in near(picked, 4):
        if candidate.target not in CHOICES or shape_of(candidate) != shape_of(picked):
            continue
        match lifter.element(candidate, index):
            case n.Apply("where", (c, n.Const(-1), kept)) if kept == place and is_none(c):
                return candidate
            case n.Apply("where", (c, kept, n.Const(-1))) if kept == place and is_none(n.not_(c)):
                return candidate
    return None


def leads_only_to(node: Node, target: Node, depth: int = 8) -> bool:
    """Whether every path from a node goes through ``target``."""
    following = users(node)
    return bool(following) and all(
        user is target or (depth > 0 and is_light(user) and leads_only_to(user, target, depth - 1))
        for user in following
    )


Readiness = Callable[[Lifter, n.Load, Expr], Expr]
"""The condition that a place, named by an element of the picks, is ready."""


@dataclass
class Uses:
    """How an expression reads the picks.

    Attributes:
        members: membership.
        slots: any other function of a slot's entry, the same for every slot; all slots are asked.
    """

    members: list[Member] = field(default_factory=list)
    slots: list[tuple[n.Load, Expr]] = field(default_factory=list)


def shows_sets_only(lifter: Lifter, picked: Node, ready: Readiness | None) -> None:
    """Proves that the order of the picks matters nowhere, nor which of them are not ready.

    Args:
        ready: None where every pick is ready or marked by -1.

    Raises:
        Refused: what else of the picks is read, and where.
    """
    reached, pending = {picked}, [picked]
    while pending:  # everything computed from the picks
        for user in pending.pop().users:
            if user not in reached:
                reached.add(user)
                pending.append(user)
    whole = Lifter({*lifter.opaque, picked})
    # A smaller expression may tell what a large one does not.
    beside = Lifter({*whole.opaque, *_beside(reached)})
    shown = {picked: ORDER}
    pending = [picked]
    while pending:
        node = pending.pop()
        for user in users(node):
            if user in shown or _is_number(user):
                continue
            what = _shown(whole, user, picked, reached, ready) if is_tensor(user) else ORDER
            if what and is_light(user):
                with suppress(Refused):  # where readiness itself is not read so
                    what = min(what, _shown(beside, user, picked, reached, ready), key=WORST.index)
            shown[user] = what = what and (shown[node] if what == ORDER else what)
            if what and (user.op == "output" or not is_light(user)):
                raise Refused(f"{what} of the selected places matters to {user.name}", user)
            if what:
                pending.append(user)


def _is_number(node: Node) -> bool:
    """A size, or a number made of sizes."""
    return node.op == "call_function" and not is_tensor(node) and not isinstance(node.meta.get("val"), (tuple, list))


def _beside(reached: Collection[Node]) -> Iterator[Node]:
    """What is read together with the picks and does not come from them, but for constants."""
    from_inputs: dict[Node, bool] = {}

    def depends(node: Node) -> bool:
        if node not in from_inputs:
            tensors = (i for i in node.all_input_nodes if is_tensor(i))  # sizes are no values
            from_inputs[node] = node.op != "call_function" or any(depends(i) for i in tensors)
        return from_inputs[node]

    return (
        source
        for node in reached
        for source in node.all_input_nodes
        if source not in reached and is_tensor(source) and depends(source)
    )


def _shown(lifter: Lifter, node: Node, picked: Node, reached: Collection[Node], ready: Readiness | None) -> str:
    """What of the picks a node's elements still show; "" if only which ready entries are among them."""
    index = tuple(n.Var(f"x{d}", extent) for d, extent in enumerate(shape_of(node)))
    e = lifter.element(node, index)
    uses = Uses()
    if not _collect(e, picked, reached, uses):
        return ORDER
    if ready is None:
        return ""
    for element, body in uses.slots:
        late = without(body, n.conjuncts(ready(lifter, element, element)))
        if any(_reads(part, reached) for part in late.walk()):
            return CHOICE
    if not uses.members:
        return ""
    first, *others = [(member.element, member.place) for member in uses.members]
    if any((element.index[:-1], place) != (first[0].index[:-1], first[1]) for element, place in others):
        return CHOICE
    late = without(e, n.conjuncts(ready(lifter, *first)))
    return CHOICE if any(_reads(part, reached) for part in late.walk()) else ""


def _collect(e: Expr, picked: Node, reached: Collection[Node], uses: Uses) -> bool:
    """Whether an expression reads the picks without their order; how it does goes into ``uses``."""
    if _reads(e, reached):
        return False
    if isinstance(e, n.Reduce) and any(_reads(part, reached) for part in e.walk()):
        found = member(e)
        whole = e.variable.size == shape_of(picked)[-1]  # not the first few of them
        if found is not None and found.element.node is picked and whole:
            if any(_reads(p, reached) for p in found.place.walk()):
                return False
            uses.members.append(found)
            return True
        of_slot = _of_slots(e, picked, reached)
        if of_slot is not None:
            uses.slots.append(of_slot)
            return True
    return all(_collect(child, picked, reached, uses) for child in e.children)


def _of_slots(e: n.Reduce, picked: Node, reached: Collection[Node]) -> tuple[n.Load, Expr] | None:
    """An element of the picks, and the function of it that a reduction joins over all slots; None if it is none.

    The variable may run through several places of each slot, one slot after the other, and through places that have
    nothing to do with the picks, before them and behind.
    """
    if e.kind == "sum" and not n.is_integral(e.body):
        return None
    asked = {part.index[-1] for part in e.walk() if isinstance(part, n.Load) and part.node is picked}
    found = _slot(asked.pop(), e.variable) if len(asked) == 1 else None
    if found is None:
        return None
    (width, before), count = found, shape_of(picked)[-1]
    behind = e.variable.size - width * count - before
    if before < 0 or not n.never_negative(n.size(behind)):
        return None  # not all slots
    slot, within = n.fresh("i", count), n.fresh("r", width)
    first = n.Const(before)
    own = n.add(first, n.add(n.mul(n.Const(width), slot), within if width > 1 else n.ZERO))
    last = n.add(first, n.size(width * count))
    for start, size in ((n.ZERO, before), (last, behind)):
        place = n.add(start, n.fresh("m", size))
        if size != 0 and any(_reads(part, reached) for part in n.substitute(e.body, {e.variable: place}).walk()):
            return None
    body = n.substitute(e.body, {e.variable: own})
    loads = {part for part in body.walk() if _reads(part, reached)}
    element = loads.pop() if len(loads) == 1 else None
    if not isinstance(element, n.Load) or element.node is not picked or element.index[-1] != slot:
        return None
    if any({slot, within} & i.variables for i in element.index[:-1]) or _reads_beside(body, slot, element):
        return None
    return element, body


def _slot(place: Expr, variable: n.Var) -> tuple[int, int] | None:
    """Of ``(variable - before) // width``: the width, and how many come before."""
    terms, whole = n.parts(place)
    match list(terms.items()):
        case [(n.Var() as found, 1)] if found == variable:
            return 1, -whole
        case [(n.Apply("floordiv", (inner, n.Const(int(width)))), 1)]:
            of_inner, rest = n.parts(inner)
            return (width, -whole * width - rest) if of_inner == {variable: 1} else None
    return None


def _reads_beside(e: Expr, variable: n.Var, element: Expr) -> bool:
    """Whether a variable is in an expression elsewhere than in one element."""
    return e == variable or (e != element and any(_reads_beside(c, variable, element) for c in e.children))


def _reads(e: Expr, nodes: Collection[Node]) -> bool:
    return isinstance(e, (n.Load, n.Softmax)) and e.node in nodes


def without(e: Expr, conditions: tuple[Expr, ...]) -> Expr:
    """``e`` where not all of the conditions hold."""
    if conditions and set(conditions) <= set(n.conjuncts(e)):
        return n.FALSE
    match e:
        case n.Apply("and", arguments):
            result: Expr = n.TRUE
            for argument in arguments:
                result = n.and_(result, without(argument, conditions))
            return result
        case n.Apply("or", _):
            return n.not_(without(n.not_(e), conditions))
        case n.Apply("not", (inner,)):
            return n.not_(without(inner, conditions))
        case n.Apply("where", (c, yes, no)):
            return n.where(without(c, conditions), without(yes, conditions), without(no, conditions))
    return n.TRUE if (n.not_(e),) == conditions else e
