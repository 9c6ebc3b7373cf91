"""The logits of a softmax attention taken apart: ``cap(scale * q.k) + biases``, under masks.

Identities used: a softmax does not change when all its logits shift by the same amount; a constant factor goes into
a sum; what is negligible beside any ordinary score is a mask, whether it is added or filled in.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node

from kreg.rewriters import notation as n
from kreg.rewriters.anchors import is_sdpa, logits_of
from kreg.rewriters.graph import dtype_of
from kreg.rewriters.lift import Lifter, is_regular
from kreg.rewriters.masks import ABSORBING, NEGLIGIBLE, keep_of
from kreg.rewriters.notation import Expr, Var
from kreg.rewriters.site import Refused
from kreg.rewriters.stretches import Stretch, join, lifted_on, split

INFINITE = float("-inf")
TOPS = frozenset({torch.ops.aten.amax.default, torch.ops.aten.max.dim, torch.ops.aten.max.default})
"""What gives the largest of some numbers."""


@dataclass(frozen=True)
class MaskTerm:
    """One mask on the scores.

    Attributes:
        keep: the condition under which a key is kept.
        expression: what was added, or the condition of the fill.
        value: what a masked key's score becomes, or is added to it; NaN where there are several such numbers.
        added: whether it is added, not filled in.
        depth: how many fills were around it.
        stretches: the masks that it is made of, where each stretch of keys has its own; there may be none.
    """

    keep: Expr
    expression: Expr
    value: float
    added: bool
    depth: int
    stretches: tuple[tuple[Stretch, tuple[MaskTerm, ...]], ...] = ()

    @property
    def levels(self) -> tuple[float, ...]:
        """The values that an additive mask holds."""
        if not self.added or self.expression == self.keep:
            return ()
        return tuple(sorted({float(part.value) for part in _constants(self.expression)}))


@dataclass(frozen=True)
class Bias:
    """A term added to the scores: ``factor * expression``; ``depth`` and ``stretches`` as in `MaskTerm`."""

    expression: Expr
    factor: float
    depth: int
    stretches: tuple[tuple[Stretch, tuple[Bias, ...]], ...] = ()


@dataclass(frozen=True)
class Product:
    """``sum over channels of q * keys``, q indexed by the query and keys by the key.

    ``factor`` is a constant, ``tempers`` are factors that no key has: they may as well be the queries'. ``keys`` is an
    element of one tensor, or on each stretch of keys one of another.
    """

    q: n.Load
    keys: Expr
    channels: tuple[Var, ...]
    factor: float
    tempers: tuple[Expr, ...] = ()

    @property
    def k(self) -> n.Load:
        """The element of the one tensor that holds the keys."""
        if not isinstance(self.keys, n.Load):
            raise Refused("the keys are in several tensors")
        return self.keys


@dataclass(frozen=True)
class Scores:
    """The logits of one key.

    Attributes:
        product: of queries and keys.
        scale, softcap: of the product; 0 for no cap.
        masks, biases: outermost first.
        shift: terms that all keys share.
        floored: whether what a mask or a bias makes of scores becomes one number, by a maximum or by a multiplication
            with 0.
    """

    product: Product
    scale: float
    softcap: float
    masks: tuple[MaskTerm, ...]
    biases: tuple[Bias, ...]
    shift: tuple[Expr, ...]
    floored: bool = False

    @property
    def keep(self) -> Expr:
        """The condition that all masks together make."""
        return _together(self.masks)


@dataclass
class _Terms:
    lifter: Lifter
    key: Expr
    result: torch.dtype
    at: Node
    whole: bool = False  # leave what is added as it is
    some: bool = False  # these are but some of the keys: what they share is no shift of all
    shared: bool = False  # leave what all keys share where it is added
    logits: torch.dtype = torch.float32
    values: frozenset[Var] = frozenset()  # what the values are indexed by
    masks: list[MaskTerm] = field(default_factory=list)
    biases: list[Bias] = field(default_factory=list)
    shift: list[Expr] = field(default_factory=list)
    cores: list[Bias] = field(default_factory=list)
    floor: bool = False  # around some of these
    floored: bool = False

    def collect(self, e: Expr, factor: float, depth: int) -> None:
        if isinstance(e, n.Apply) and e.function == "add" and self._is_worth_splitting(e):
            for part in self._parts(e):
                self.collect(part, factor, depth)
            return
        if self.whole and not has_product(e):
            self.biases.append(Bias(e, factor, depth))
            return
        keep = keep_of(e if factor == 1.0 else n.mul(n.Const(factor), e))
        if keep is not None:
            if keep != n.TRUE:
                self.masks.append(MaskTerm(keep, e, self._in_range(_value(e) * factor), added=True, depth=depth))
            return
        if self._is_shared(e):
            self.shift.append(e if factor == 1.0 else n.mul(n.Const(factor), e))
            return
        match e:
            case n.Apply("mul", (n.Const(0.0), *_)) if has_product(e):
                raise Refused("the scores are multiplied by 0, which is NaN wherever they are infinite", self.at)
            case n.Apply("mul", (n.Const(c), *rest)) if has_product(e):
                self.collect(n.product(tuple(rest)), factor * c, depth)
                return
            case n.Apply("max" | "min", (n.Const(value), x)) if self._is_far(e, x, value * factor, factor):
                self._within(x, factor, depth, floor=value * factor < 0)
                return
            case n.Apply("where", (c, x, n.Const(value))) if self._is_fill(c, x, value * factor):
                self._fill(c, x, value, factor, depth)
                return
            case n.Apply("where", (c, n.Const(value), x)) if self._is_fill(c, x, value * factor):
                self._fill(n.not_(c), x, value, factor, depth)
                return
            case n.Apply("rounded:bfloat16" | "rounded:float16", (inner,)):
                if str(self.result).removeprefix("torch.") not in e.function:
                    raise Refused(f"the scores are {e.function.replace(':', ' to ')} on the way", self.at)
                self.collect(inner, factor, depth)
                return
        if isinstance(e, n.Softmax):
            raise Refused("the logits hold another softmax", self.at)
        (self.cores if has_product(e) else self.biases).append(Bias(e, factor, depth))

    def settle(self) -> list[Expr]:
        """Products that are multiplied by conditions: biases beside another product, else the scores themselves.

        Returns:
            The conditions that the scores are multiplied by.
        """
        gated = [core for core in self.cores if gates(core.expression)]
        self.cores = [core for core in self.cores if core not in gated]
        if self.cores:
            self.biases.extend(gated)
            return []
        for core in gated:
            ungated = tuple(f for f in factors_of(core.expression) if gate(f) is None)
            self.collect(n.product(ungated), core.factor, core.depth)
        return [condition for core in gated for condition in gates(core.expression)]

    def _parts(self, e: n.Apply) -> list[Expr]:
        """The terms of a sum; what is neither product, mask nor shared by all keys stays one term, as it was added."""
        apart: list[Expr] = []
        together: Expr = n.ZERO
        for part in e.arguments:
            constant = isinstance(part, n.Const) and not self._masks_all(part)
            is_mask = not self.whole and keep_of(part) is not None
            if not constant and (has_product(part) or self._is_shared(part) or is_mask):
                apart.append(part)
            else:
                together = n.add(together, part)
        return apart if together == n.ZERO else [*apart, together]

    def _is_shared(self, e: Expr) -> bool:
        """Whether all keys share a term, which shifts their logits."""
        return not self.shared and bool(self.key.variables) and not self.key.variables & e.variables

    def _masks_all(self, constant: n.Const) -> bool:
        """Whether a number masks all the keys at hand, beside which there are others; a small one masks none.

        Raises:
            Refused: there are no others.
        """
        if abs(constant.value) < -NEGLIGIBLE:
            return False
        if not self.some:
            raise Refused(f"{constant.value:g} is added to every score, in which little is left of them", self.at)
        return True

    def _is_worth_splitting(self, e: n.Apply) -> bool:
        """A sum in which the product is, or a mask: other sums are one bias, added up as the model does."""
        return has_product(e) or (not self.whole and any(keep_of(argument) is not None for argument in e.arguments))

    def _is_fill(self, c: Expr, x: Expr, value: float) -> bool:
        """A mask around the scores, or around a bias by nothing but places; a bias that data masks stays one tensor."""
        return value <= NEGLIGIBLE and (has_product(x) or not any(isinstance(part, n.Load) for part in c.walk()))

    def _is_far(self, e: n.Apply, x: Expr, bound: float, factor: float) -> bool:
        """A bound that no ordinary score reaches, around the scores or a mask; a bias with bounds stays one tensor."""
        from_below = (e.function == "max") == (factor > 0)
        far = bound <= NEGLIGIBLE if from_below else bound >= -NEGLIGIBLE
        return far and (has_product(x) or keep_of(x) is not None)

    def _within(self, x: Expr, factor: float, depth: int, floor: bool) -> None:
        before = len(self.masks) + len(self.biases)
        self.collect(x, factor, depth)
        self.floor |= floor
        self.floored |= floor and len(self.masks) + len(self.biases) > before

    def _in_range(self, value: float) -> float:
        """A number as the logits can hold it: the lowest one of a dtype, times two, is -inf."""
        return value if not abs(value) > torch.finfo(self.logits).max else math.copysign(math.inf, value)

    def _fill(self, keep: Expr, x: Expr, value: float, factor: float, depth: int) -> None:
        added = not has_product(x)
        self.masks.append(MaskTerm(keep, keep, self._in_range(value * factor), added=added, depth=depth))
        self.collect(x, factor, depth + 1)


def take_apart(
    lifter: Lifter,
    logits: Expr,
    at: Expr,
    result: torch.dtype,
    node: Node,
    added_to: Scores | None = None,
    whole: bool = False,
    some: bool = False,
    values: frozenset[Var] = frozenset(),
    shared: bool = False,
) -> Scores:
    """Takes the logit of key ``at`` apart.

    Args:
        lifter: what lifted it.
        logits: the logit, an expression.
        at: the index of the key: a variable, or an expression that stands for it.
        result: the dtype that weights are rounded to in the end; rounding to it on the way is no loss.
        node: what to name in refusals.
        added_to: the scores that the logits are added to, where the product is no part of them.
        whole: read nothing into what is added, so that every term but fills is a bias.
        some: there are other keys beside these.
        values: what the values are indexed by, which tells the keys from other factors of the queries.
        shared: leave what all keys share where it is added, so that it is part of a bias and no shift.

    Raises:
        Refused: the logits are not of the form above.
    """
    held = node if is_sdpa(node) else logits_of(node)[0]
    terms = _Terms(lifter, at, result, node, whole, some, shared, dtype_of(held), values)
    terms.collect(logits, 1.0, 0)
    conditions = terms.settle()
    if added_to is not None:
        terms.biases.extend(_joined(terms.cores))
        return replace(
            added_to,
            masks=tuple(terms.masks),
            biases=tuple(terms.biases),
            shift=tuple(terms.shift),
            floored=terms.floored,
        )
    kept = {c for term in terms.masks for c in n.conjuncts(term.keep)}
    if not all(c in kept for g in conditions for c in n.conjuncts(g)):
        raise Refused("scores are multiplied by a condition that no mask repeats", node)
    core, found = _the_product(terms)
    masks = (*terms.masks, *found.masks)
    if any(not term.value > ABSORBING for term in masks) and not all(map(is_top, terms.shift)):
        return take_apart(lifter, logits, at, result, node, added_to, whole, some, values, shared=True)
    others = _joined([other for other in terms.cores if other is not core])
    return replace(
        found,
        masks=masks,
        biases=(*terms.biases, *found.biases, *others),
        shift=tuple(terms.shift),
        floored=terms.floored or found.floored or bool(conditions) or (terms.floor and _may_mask(found)),
    )


def _the_product(terms: _Terms) -> tuple[Bias, Scores]:
    """The term that is the product of queries and keys; others, as with keys by their distance, are biases.

    Raises:
        Refused: there is none.
    """
    refusal = Refused("the logits are not one product of queries and keys", terms.at)
    found: list[tuple[Bias, Scores]] = []
    for core in terms.cores:
        try:
            found.append((core, _of_core(core, terms)))
        except Refused as refused:
            refusal = refused
    if not found:
        raise refusal
    return min(found, key=lambda one: _strangeness(one[1].product, terms))


def _strangeness(product: Product, terms: _Terms) -> tuple[int, bool]:
    """How many variables the keys have that the values have not, and whether an index is a difference, or a part."""
    own = product.keys.variables - {*product.channels, *terms.key.variables} - terms.values
    loads = [part for e in (product.q, product.keys) for part in e.walk() if isinstance(part, n.Load)]
    return len(own), not all(is_regular(load.node, load.index) for load in loads)


def _of_core(core: Bias, terms: _Terms) -> Scores:
    """A term with a product in it, as scores."""
    stretches = split(core.expression, terms.key, lambda choice: all(map(has_product, choice.arguments[1:])))
    if not stretches:
        product, scale, softcap = _core(core.expression, core.factor, terms.key, terms.at)
        return Scores(product, scale, softcap, (), (), ())

    def own(stretch: Stretch) -> Scores:
        assert isinstance(terms.key, Var)
        e = n.mul(n.Const(core.factor), lifted_on(terms.lifter, core.expression, terms.key, stretch))
        return take_apart(
            terms.lifter,
            e,
            stretch.variable,
            terms.result,
            terms.at,
            whole=terms.whole,
            some=True,
            values=terms.values,
        )

    return _in_a_row([(stretch, own(stretch)) for stretch in stretches], terms.key, core.depth, terms.at)


def _in_a_row(parts: Sequence[tuple[Stretch, Scores]], key: Expr, depth: int, node: Node) -> Scores:
    """The scores of stretches of keys as those of all keys."""
    assert isinstance(key, Var)
    first = parts[0][1]
    keys: list[tuple[Stretch, Expr]] = []
    for stretch, scores in parts:
        product = scores.product
        names = dict[Var, Expr](zip(product.channels, first.product.channels, strict=False))
        q, tempers = n.substitute(product.q, names), tuple(n.substitute(e, names) for e in product.tempers)
        if [c.size for c in product.channels] != [c.size for c in first.product.channels] or q != first.product.q:
            raise Refused("the keys are in several tensors that are not multiplied by the same queries", node)
        if (scores.scale, scores.softcap, tempers) != (first.scale, first.softcap, first.product.tempers):
            raise Refused("the keys are in several tensors, and their scores are scaled each in its own way", node)
        keys.append((stretch, n.substitute(product.keys, names)))
    masks = tuple((stretch, scores.masks) for stretch, scores in parts)
    # what all keys of a stretch are shifted by, the others are not
    biases = tuple(
        (stretch, (*scores.biases, *(Bias(e, 1.0, depth) for e in scores.shift))) for stretch, scores in parts
    )
    return replace(
        first,
        product=replace(first.product, keys=join(keys, key)),
        masks=(_mask_in_a_row(masks, biases, key, depth),) if any(own for _, own in masks) else (),
        biases=(_bias_in_a_row(biases, key, depth),) if any(own for _, own in biases) else (),
        shift=(),
        floored=any(scores.floored for _, scores in parts),
    )


def _mask_in_a_row(
    masks: tuple[tuple[Stretch, tuple[MaskTerm, ...]], ...],
    biases: tuple[tuple[Stretch, tuple[Bias, ...]], ...],
    key: Var,
    depth: int,
) -> MaskTerm:
    """Masks of stretches as one: filled in with one number, or, where that is not certain, with one unknown."""
    terms = [term for _, own in masks for term in own]
    values = {term.value for term in terms}
    plain = not any(term.added for term in terms) and all(len(own) <= 1 for _, own in masks)
    alone = plain and not any(own for _, own in biases)
    value = values.pop() if len(values) == 1 and (values == {INFINITE} or alone) else float("nan")
    keep = join([(stretch, _together(own)) for stretch, own in masks], key)
    return MaskTerm(keep, keep, value, added=not plain, depth=depth, stretches=masks)


def _bias_in_a_row(biases: tuple[tuple[Stretch, tuple[Bias, ...]], ...], key: Var, depth: int) -> Bias:
    sums: list[tuple[Stretch, Expr]] = []
    for stretch, own in biases:
        total: Expr = n.Const(0.0)
        for bias in own:
            total = n.add(total, n.mul(n.Const(bias.factor), bias.expression))
        sums.append((stretch, total))
    return Bias(join(sums, key), 1.0, depth, stretches=biases)


def _together(masks: Sequence[MaskTerm]) -> Expr:
    """The condition that some masks make together."""
    result: Expr = n.TRUE
    for mask in masks:
        result = n.and_(result, mask.keep)
    return result


def _joined(biases: Sequence[Bias]) -> list[Bias]:
    """Products that are no scores, added up as the model may have done before it added them to the scores."""
    found: dict[tuple[float, int], Bias] = {}
    for bias in biases:
        at = bias.factor, bias.depth
        found[at] = replace(found[at], expression=n.add(found[at].expression, bias.expression)) if at in found else bias
    return list(found.values())


def _may_mask(scores: Scores) -> bool:
    return bool(scores.masks or scores.biases)


def is_top(shift: Expr) -> bool:
    """Whether what is subtracted from all logits is the largest of them, as softmax does itself; or finite anyway."""
    if isinstance(shift, n.Const):
        return abs(shift.value) < -NEGLIGIBLE
    _, e = n.scaled(shift)
    if not isinstance(e, n.Load):
        return isinstance(e, n.Reduce) and e.kind == "max"
    node = e.node
    while node.target in (operator.getitem, torch.ops.aten.detach.default):
        node = node.all_input_nodes[0]
    return node.op == "placeholder" or node.target in TOPS


def gate(e: Expr) -> Expr | None:
    """The condition for a factor that is 1 or 0 to be 1; None for another factor."""
    match e:
        case n.Apply("indicator", (c,)):
            return c
        case n.Apply("where", (c, n.Const(yes), n.Const(no))) if {yes, no} == {0, 1}:
            return c if yes else n.not_(c)
    return None


def gates(e: Expr) -> list[Expr]:
    """The conditions among the factors of a product."""
    return [condition for f in factors_of(e) if (condition := gate(f)) is not None]


def summands(e: Expr) -> list[Expr]:
    """The terms of a sum as `take_apart` tells them, for a logit without a product."""
    if isinstance(e, n.Apply) and e.function == "add":
        return [part for argument in e.arguments for part in summands(argument)]
    return [] if e == n.Const(0.0) else [e]


def _value(e: Expr) -> float:
    """The number that stands for "masked" in an additive mask; NaN where several may, or their sums."""
    if any(isinstance(part, n.Apply) and part.function == "add" for part in e.walk()):
        return float("nan")
    found = {float(part.value) for part in _constants(e) if part.value <= NEGLIGIBLE}
    return found.pop() if len(found) == 1 else float("nan")


def _constants(e: Expr) -> Iterator[n.Const]:
    """The values of an additive mask, its conditions left out."""
    match e:
        case n.Const():
            yield e
        case n.Apply("where", (_, yes, no)):
            yield from _constants(yes)
            yield from _constants(no)
        case n.Apply(_, arguments):
            for argument in arguments:
                yield from _constants(argument)


def has_product(e: Expr) -> bool:
    """Whether a sum over channels is somewhere in an expression."""
    return any(isinstance(part, n.Reduce) and part.kind == "sum" and not n.is_integral(part) for part in e.walk())


def _core(e: Expr, factor: float, key: Expr, node: Node) -> tuple[Product, float, float]:
    """``cap * tanh(scale / cap * product)`` or ``scale * product``, times a factor: (product, scale, softcap)."""
    match e:
        case n.Apply("tanh", (argument,)):
            inner, product = n.scaled(argument)
            if isinstance(product, n.Apply) and product.function == "add" and has_product(product):
                raise Refused("a term is added to the scores before they are capped, not after", node)
            found = product_of(product, key, node)
            return found, inner * factor * found.factor, factor
    found = product_of(e, key, node)
    return found, factor * found.factor, 0.0


def product_of(e: Expr, key: Expr, node: Node) -> Product:
    """q, k and the channels they are summed over, from ``sum_d q[.., s, d] * k[.., t, d]``.

    Raises:
        Refused: another form.
    """
    outer, tempers = 1.0, list[Expr]()
    if isinstance(e, n.Apply) and e.function in ("mul", "div"):
        outer, e, tempers = _tempered(e, key)
    if not isinstance(e, n.Reduce):
        name = e.function if isinstance(e, n.Apply) else type(e).__name__.lower()
        raise Refused(f"the scores pass through {name!r} before the softmax", node)
    channels, scale, body = sum_over(e)
    scale *= outer
    factors = factors_of(body)
    operands = [f for f in factors if isinstance(f, n.Load)]
    if len(operands) != 2 or len(factors) != 2:
        raise Refused("the scores are not a product of two tensors", node)
    with_key = [f for f in operands if key.variables & f.variables]
    if len(with_key) != 1:
        raise Refused("the scores' operands are not one of queries and one of keys", node)
    (k,) = with_key
    (q,) = (f for f in operands if f is not k)
    return Product(q, k, channels, scale, tuple(tempers))


def _tempered(e: n.Apply, key: Expr) -> tuple[float, Expr, list[Expr]]:
    """A product with other factors, taken apart: a constant, the product, and those of the factors that no key has."""
    if e.function == "div":
        top, bottom = e.arguments
        ratio = n.apply("div", n.Const(1.0), bottom)
        return (1.0, e, []) if key.variables & bottom.variables else (1.0, top, [ratio])
    constant, rest = n.scaled(e)
    factors = factors_of(rest)
    sums = [f for f in factors if isinstance(f, n.Reduce)]
    others = [f for f in factors if not isinstance(f, n.Reduce)]
    if len(sums) != 1 or any(key.variables & f.variables for f in others):
        return 1.0, e, []
    return constant, sums[0], others


def sum_over(e: Expr) -> tuple[tuple[Var, ...], float, Expr]:
    """The variables of nested sums, a constant factor, and what is summed."""
    channels: list[Var] = []
    factor = 1.0
    while True:
        more, e = n.scaled(e)
        factor *= more
        if not isinstance(e, n.Reduce) or e.kind != "sum":
            return tuple(channels), factor, e
        channels.append(e.variable)
        e = e.body


def terms_of(e: Expr) -> tuple[Expr, ...]:
    """The terms of a sum."""
    return e.arguments if isinstance(e, n.Apply) and e.function == "add" else (e,)


def factors_of(e: Expr) -> tuple[Expr, ...]:
    """The factors of a product."""
    return e.arguments if isinstance(e, n.Apply) and e.function == "mul" else (e,)
