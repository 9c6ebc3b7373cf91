"""Constraints: what they accept, how they refuse, and that deciding early is never wrong."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kreg.errors import SpecError
from kreg.registry.constraints import Constraint, SymbolicSize, Verdict

NAMES = ("batch", "head_dim", "keys", "ratio", "window", "kind", "has_padding")

HOLDING = [
    "head_dim % 16 == 0 and head_dim <= 512",
    "window == 128",
    "not has_padding",
    "ratio in (1, 4, 128)",
    "ratio not in (2, 3)",
    "16 <= head_dim < 256",
    "head_dim == 2 ** 6 and head_dim // 3 == 21 and head_dim / 4 == 16.0",
    "min(head_dim, keys, 100) == 10 and max(head_dim, keys) == 64",
    "-keys + 1 < 0 - (keys - 2)",
    "kind == 'causal' and kind != None and kind in ('causal', 'full')",
    "has_padding or (keys * 0.5 == 5.0 and True)",
    "has_padding == (ratio == 3)",
]
VALUES: dict[str, Any] = {
    "batch": 1,
    "head_dim": 64,
    "keys": 10,
    "ratio": 4,
    "window": 128,
    "kind": "causal",
    "has_padding": False,
}


@pytest.mark.parametrize("text", HOLDING)
def test_an_expression_holds_where_python_says_so(text: str) -> None:
    constraint = Constraint.parse(text, NAMES)
    assert constraint.holds(VALUES)
    assert constraint.decide(VALUES) is Verdict.YES
    assert not Constraint.parse(f"not ({text})", NAMES).holds(VALUES)


@pytest.mark.parametrize(
    ("text", "problem", "part"),
    [
        ("headdim % 16 == 0", "did you mean 'head_dim'?", "headdim"),
        ("head_dim % 16 = 0", "write == to compare", "="),
        ("head_dim % 16 == 0 and", "invalid syntax", ""),
        ("head_dim <= len(kind)", "is not part of this language", "len(kind)"),
        ("head_dim.real == 1", "is not part of this language", "head_dim.real"),
        ("keys > head_dim + kind[0]", "is not part of this language", "kind[0]"),
        ("(lambda: 1)() == 1", "is not part of this language", "(lambda: 1)()"),
        ("keys == 1j", "is not part of this language", "1j"),
        ("ratio is None", "use == or !=", "ratio"),
        ("ratio in 4", "membership needs a tuple", "4"),
        ("head_dim + 1", "is a value, not a condition", "head_dim + 1"),
        ("has_padding and 3", "is a value, not a condition", "3"),
        ("'a' < keys", "is not a number", "'a'"),
        ("2 ** keys > 3", "an exponent is a literal integer", "keys"),
        ("2 ** 10000 > keys", "an exponent is a literal integer", "10000"),
        ("'größe' == kind and höhe > 1", "'höhe' is not a known name", "höhe"),
    ],
)
def test_a_malformed_expression_is_refused_with_a_caret_under_the_wrong_part(
    text: str, problem: str, part: str
) -> None:
    with pytest.raises(SpecError) as caught:
        Constraint.parse(text, NAMES)
    message = str(caught.value)
    assert problem in message and repr(text) in message and "known names: batch, has_padding" in message
    _, shown, marks, _ = message.splitlines()
    column = marks.index("^")
    assert shown[4:] == text
    assert f"column {column - 3}" in message
    assert shown[column:].startswith(part) and marks.count("^") == max(len(part), 1)


@pytest.mark.parametrize("text", ["", "   ", "x" * 5000, "not " * 240 + "keys", "(" * 300 + "1", "a\0b"])
def test_text_that_is_no_expression_is_refused_and_nothing_else_happens(text: str) -> None:
    with pytest.raises(SpecError, match="constraint"):
        Constraint.parse(text, NAMES[:0])


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused_with_a_spec_error(text: str) -> None:
    with contextlib.suppress(SpecError):
        Constraint.parse(text, NAMES).holds(VALUES)


def test_nothing_is_executed() -> None:
    with pytest.raises(SpecError):
        Constraint.parse("__import__('os').system('exit 1') == 0", NAMES)


def test_a_powers_size_is_bounded() -> None:
    tower = Constraint.parse("(((keys ** 64) ** 64) ** 64) ** 64 > 0", NAMES)
    assert not tower.holds({"keys": 2**60})
    assert tower.decide({"keys": SymbolicSize("s", 1)}) is Verdict.UNKNOWN


def test_what_has_no_value_does_not_hold_either_way_round() -> None:
    for text in (
        "keys % ratio == 0",
        "not keys % ratio == 0",
        "keys < kind",
        "window <= 3",
        "not window <= 3",
    ):
        values: dict[str, Any] = {"keys": 10, "ratio": 0, "kind": "causal"}
        assert not Constraint.parse(text, NAMES).holds(values)
        assert Constraint.parse(text, NAMES).decide(values) is Verdict.NO


def test_a_guard_protects_what_has_no_value() -> None:
    guarded = Constraint.parse("ratio == 0 or keys % ratio == 0", NAMES)
    assert guarded.holds({"keys": 10, "ratio": 0})
    assert Constraint.parse("window == None or window <= 3", NAMES).holds({})


@pytest.mark.parametrize(
    ("text", "sizes", "verdict"),
    [
        ("keys % 16 == 0", {"keys": SymbolicSize("16*s", 16, None, multiple_of=16)}, Verdict.YES),
        ("keys % 48 == 0", {"keys": SymbolicSize("16*s", 16, None, multiple_of=16)}, Verdict.UNKNOWN),
        ("keys % 16 == 8", {"keys": SymbolicSize("16*s", 16, None, multiple_of=16)}, Verdict.NO),
        ("(keys + 3) % 8 == 3", {"keys": SymbolicSize("16*s", 16, None, multiple_of=16)}, Verdict.YES),
        ("keys // 8 % 2 == 0", {"keys": SymbolicSize("16*s", 16, None, multiple_of=16)}, Verdict.YES),
        ("keys * 2 % 4 == 0", {"keys": SymbolicSize("2*s", 2, None, multiple_of=2)}, Verdict.YES),
        ("keys <= 512", {"keys": SymbolicSize("s", 1, 512)}, Verdict.YES),
        ("keys <= 512", {"keys": SymbolicSize("s", 1, None)}, Verdict.UNKNOWN),
        ("keys > 0", {"keys": SymbolicSize("s", 1, None)}, Verdict.YES),
        ("keys == head_dim", {"keys": SymbolicSize("s"), "head_dim": SymbolicSize("s")}, Verdict.YES),
        ("keys == head_dim", {"keys": SymbolicSize("s"), "head_dim": SymbolicSize("t")}, Verdict.UNKNOWN),
        ("keys + 1 != head_dim + 1", {"keys": SymbolicSize("s"), "head_dim": SymbolicSize("s")}, Verdict.NO),
        ("keys == None", {"keys": SymbolicSize("s")}, Verdict.NO),
        ("keys in (2, 4)", {"keys": SymbolicSize("s", 5, 9)}, Verdict.NO),
        ("has_padding or keys < 4", {"keys": SymbolicSize("s"), "has_padding": True}, Verdict.YES),
        ("keys < 4 and has_padding", {"keys": SymbolicSize("s"), "has_padding": False}, Verdict.NO),
        ("10 % keys == 0", {"keys": SymbolicSize("s", 0, 4)}, Verdict.UNKNOWN),
        ("keys / 2 < 3", {"keys": SymbolicSize("s", 0, 5)}, Verdict.YES),
        ("keys ** 2 % 4 == 0", {"keys": SymbolicSize("2*s", 0, None, multiple_of=2)}, Verdict.YES),
        ("min(keys, 128) <= 128", {"keys": SymbolicSize("s")}, Verdict.YES),
    ],
)
def test_symbolic_sizes_are_decided_by_bounds_and_divisibility(
    text: str, sizes: dict[str, Any], verdict: Verdict
) -> None:
    assert Constraint.parse(text, NAMES).decide(sizes) is verdict


def test_a_refusal_names_the_part_that_fails_and_the_value() -> None:
    constraint = Constraint.parse("head_dim % 16 == 0 and head_dim <= 256 and not has_padding", NAMES)
    assert (
        constraint.explain({"head_dim": 512, "has_padding": False}) == "head_dim <= 256 does not hold: head_dim is 512"
    )
    assert constraint.explain({"head_dim": 64, "has_padding": True}) == (
        "not has_padding does not hold: has_padding is True"
    )
    assert constraint.explain({"head_dim": SymbolicSize("s0", 1, 64), "has_padding": False}) == (
        "head_dim % 16 == 0 is checked at call time: head_dim is s0 (from 1 to 64)"
    )
    assert constraint.explain({}) == "head_dim % 16 == 0 does not hold: there is no head_dim here"


def test_a_size_that_cannot_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="no size can satisfy"):
        SymbolicSize("s", 4, 3)


# Random expressions over two sizes, a word, a flag and an absent dimension.
LEAVES = st.sampled_from(["a", "b", "a", "b", "flag", "word", "absent", "None", "'w'", "True", "2.5"]) | st.integers(
    -4, 20
).map(str)
NUMBERS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%"]), inner).map(
            lambda t: f"({t[0]} {t[1]} {t[2]})"
        ),
        st.tuples(inner, st.integers(0, 3)).map(lambda t: f"({t[0]} ** {t[1]})"),
        st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(lambda t: f"{t[0]}({t[1]}, {t[2]})"),
        inner.map(lambda t: f"(-{t})"),
    ),
    max_leaves=4,
)
COMPARISONS = st.one_of(
    st.tuples(NUMBERS, st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), NUMBERS).map(" ".join),
    st.tuples(NUMBERS, NUMBERS, NUMBERS).map(lambda t: f"{t[0]} <= {t[1]} < {t[2]}"),
    st.tuples(NUMBERS, st.sampled_from(["in", "not in"]), LEAVES, LEAVES).map(
        lambda t: f"{t[0]} {t[1]} ({t[2]}, {t[3]})"
    ),
)


def conditions(bare: list[str]) -> st.SearchStrategy[str]:
    """Conditions; ``bare`` are the names that stand alone in them."""
    return st.recursive(
        COMPARISONS | st.sampled_from(bare),
        lambda inner: st.one_of(
            st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
            inner.map(lambda t: f"not ({t})"),
            st.tuples(inner, inner).map(lambda t: f"({t[0]}) == ({t[1]})"),
        ),
        max_leaves=3,
    )


@st.composite
def sizes(draw: st.DrawFn, name: str) -> SymbolicSize:
    step = draw(st.integers(1, 5))
    lower = step * draw(st.integers(0, 3))
    upper = lower + draw(st.integers(0, 12))
    return SymbolicSize(name, lower, upper, multiple_of=step)


def possible(size: SymbolicSize) -> list[int]:
    assert size.upper is not None
    return [n for n in range(size.lower, size.upper + 1) if n % size.multiple_of == 0]


@settings(max_examples=400, deadline=None)
@given(conditions(["a", "flag", "not b", "word"]), sizes("s"), sizes("t"), st.booleans(), st.booleans())
@example("(a % b) == 0 or a >= 0", SymbolicSize("s", 0, 9), SymbolicSize("t", 0, 3), False, False)
@example("not ((a // (b - 2)) < 4)", SymbolicSize("s", 0, 9), SymbolicSize("t", 0, 3), False, False)
def test_a_verdict_is_never_wrong_for_any_size_in_range(
    text: str, a: SymbolicSize, b: SymbolicSize, flag: bool, same: bool
) -> None:
    if same:
        b = a
    try:
        constraint = Constraint.parse(text, ("a", "b", "flag", "word", "absent"))
    except SpecError:
        return  # arithmetic on a word
    rest: dict[str, Any] = {"flag": flag, "word": "w"}
    pairs = [(n, n) for n in possible(a)] if same else itertools.product(possible(a), possible(b))
    results = {constraint.holds({"a": x, "b": y} | rest) for x, y in pairs}
    verdict = constraint.decide({"a": a, "b": b} | rest)
    if verdict is Verdict.YES:
        assert results == {True}
    elif verdict is Verdict.NO:
        assert results == {False}


@settings(max_examples=200, deadline=None)
@given(conditions(["flag"]), st.integers(0, 20), st.integers(0, 20), st.booleans())
def test_holding_agrees_with_python(text: str, a: int, b: int, flag: bool) -> None:
    # A number or a word standing alone is left out: Python's `and` gives it back, ours gives True or False.
    try:
        constraint = Constraint.parse(text, ("a", "b", "flag", "word", "absent"))
    except SpecError:
        return
    values = {"a": a, "b": b, "flag": flag, "word": 7.5, "absent": 0}
    try:
        expected = bool(eval(text, {"min": min, "max": max}, values))
    except ArithmeticError:
        expected = False
    assert constraint.holds(values) == expected
