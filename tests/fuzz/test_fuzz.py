"""Random programs, bent and broken: every one comes out equal or untouched with a reason, plain ones rewritten."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings

from kreg.rewriters.rules import RULES
from kreg.rewriters.rules.rule import Context
from kreg.rewriters.site import Site
from tests.fuzz.expected import missing_ops
from tests.fuzz.forms import Attention, Indexed, Mask, Program
from tests.fuzz.judge import judge
from tests.fuzz.strategies import attentions, indexers, programs
from tests.fuzz.tally import Tally
from tests.fuzz.twists import TWISTS

QUIET = dict(  # noqa: C408
    database=None,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)

FORMS: tuple[Program, ...] = (
    Attention(),
    Attention(layout="bshd", product="einsum", ratio=2, masks=(Mask("window", "compared", "added"),)),
    Attention(layout="bmm", product="baddbmm", bias="alibi", masks=(Mask(made="triu", fill="added", value="min"),)),
    Attention(layout="nsd", groups=1, product="bmm", projection="fused", masks=(Mask("chunked"),)),
    Attention(layout="sd", batch=1, groups=1, projection="separate", keys=7),
    Attention(layout="bgrsd", ratio=3, sink="behind", masks=(Mask("padding", value="min"),)),
    Attention(softmax="wide", dtype="bfloat16", projection="separate", masks=(Mask(fill="chosen", value="min"),)),
    Attention(softmax="by hand", bias="relative", softcap=5.0),
    Attention(product="sdpa", masks=(Mask(made="is_causal"),), dtype="float64"),
    Attention(product="sdpa", ratio=2, spread="broadcast", masks=(Mask("window", fill="added"),)),
    Attention(ratio=2, groups=1, shared=True, masks=(Mask("window"),)),
    Attention(queries=1, keys=7, projection="separate"),
    Attention(dynamic=True, masks=(Mask("prefix"),)),
    Indexed(),
    Indexed(weighted="matmul", scatter="bool", fill="where"),
    Indexed(weighted="einsum", scatter="bool sliced", fill="masked_fill", sink=False),
)
"""One program of each kind that must be rewritten."""


@pytest.mark.parametrize("program", FORMS, ids=repr)
def test_a_plain_form_is_rewritten_and_equal(program: Program) -> None:
    verdict = judge(program)
    assert verdict.kind == "rewritten", verdict
    assert not missing_ops(program, verdict.raised), verdict


FOUND: tuple[Program, ...] = (
    Attention(
        queries=1,
        keys=5,
        masks=(Mask(fill="added", offset=4), Mask(offset=-1)),
        joined=True,
        bias="alibi",
        merged=False,
    ),
    Attention(
        layout="sd",
        batch=1,
        groups=1,
        masks=(Mask(value="min"),),
        bias="input",
        merged=False,
        trained=True,
        twists=("q: leaked",),
    ),
    Attention(projection="fused", product="sdpa", merged=False, twists=("q: rounded to bfloat16", "q: leaked")),
    Attention(layout="nsd", groups=1, sink="behind", merged=False, twists=("logits: raised by one",)),
    Attention(
        layout="bgrsd",
        projection="fused",
        batch=1,
        ratio=2,
        product="sdpa",
        dtype="float64",
        masks=(Mask(kind="band", width=1), Mask(kind="documents", fill="multiplied", value="min")),
        twists=("out: mutated by a view",),
    ),
    Attention(
        layout="nsd",
        projection="fused",
        groups=1,
        masks=(Mask(fill="added", value="min"),),
        bias="input",
        merged=False,
        twists=("logits: nothing",),
    ),
    Attention(
        layout="sd",
        projection="fused",
        batch=1,
        groups=1,
        masks=(Mask(kind="window", value=-1e4, width=1, offset=1), Mask(offset=1)),
        joined=True,
        sink="behind",
        merged=False,
        twists=("logits: batch centred",),
    ),
    Attention(layout="bmm", merged=False, twists=("q: mutated",)),
    Attention(
        projection="fused",
        masks=(Mask(kind="documents"), Mask(kind="padding", fill="added")),
        merged=False,
        twists=("q: leaked", "out: without nan"),
    ),
    Attention(
        layout="bmm",
        product="sdpa",
        masks=(Mask(kind="documents"),),
        merged=False,
        dtype="bfloat16",
        twists=("result: input mutated after",),
    ),
    Attention(
        batch=1,
        groups=1,
        masks=(Mask(kind="padding", fill="added", value="min"),),
        merged=False,
        twists=("logits: steadied by key",),
    ),
    Attention(
        projection="fused",
        batch=1,
        masks=(Mask(kind="documents", value="min"),),
        merged=False,
        twists=("logits: centred by row",),
    ),
    Attention(
        layout="nsd",
        groups=1,
        product="sdpa",
        masks=(Mask(made="is_causal"),),
        merged=False,
        twists=("q: leaked", "k: nothing"),
    ),
    Attention(
        layout="nsd",
        projection="fused",
        groups=1,
        product="baddbmm",
        bias="input",
        merged=False,
        twists=("q: leaked", "scores: centred by row"),
    ),
    Attention(groups=1, masks=(Mask(kind="padding"),), merged=False, twists=("weights: masked afterwards",)),
    Attention(
        layout="sd", batch=1, groups=1, bias="alibi", sink="behind", merged=False, twists=("logits: raised by one",)
    ),
    Attention(
        masks=(Mask(kind="chunked", width=2, offset=1), Mask(kind="chunked", made="counted", width=2)),
        merged=False,
        twists=("q: leaked",),
    ),
    Attention(
        layout="sd",
        batch=1,
        groups=1,
        masks=(Mask(kind="padding", fill="multiplied", value="min"),) * 2,
        merged=False,
        dtype="float64",
        twists=("logits: divided by the keys",),
    ),
    Attention(
        layout="sd",
        projection="fused",
        batch=1,
        groups=1,
        masks=(Mask(kind="documents"), Mask()),
        merged=False,
        twists=("q: leaked", "keys and values one apart"),
    ),
    Attention(
        projection="fused",
        masks=(Mask(value="min"), Mask(value="min", offset=-1)),
        merged=False,
        twists=("logits: leaked then mutated",),
    ),
    Attention(merged=False, twists=("out: without nan", "out: dropped out")),
    Attention(
        product="reversed",
        masks=(Mask(kind="documents", fill="in place"),),
        merged=False,
        twists=("logits: dropped out",),
    ),
)
"""What long runs came upon."""


@pytest.mark.parametrize("program", FOUND, ids=repr)
def test_what_came_out_wrong_once_does_no_more(program: Program) -> None:
    verdict = judge(program)
    assert verdict.kind in ("rewritten", "untouched"), verdict


def hold(program: Program, tally: Tally) -> None:
    """A program is not wrong, and raised if it is a plain one."""
    verdict = judge(program)
    tally.add(program, verdict)
    assert verdict.kind != "wrong", f"{verdict.detail} (raised: {verdict.raised}, kept: {verdict.reasons})"
    if verdict.kind in ("rewritten", "untouched"):
        missed = missing_ops(program, verdict.raised)
        assert not missed, f"{missed} not raised: {verdict.reasons}"


def sweep(examples: int) -> Tally:
    """Draws and judges programs."""
    tally = Tally()

    @settings(max_examples=examples, **QUIET)
    @given(program=programs())
    def one(program: Program) -> None:
        hold(program, tally)

    one()
    return tally


def assert_telling(tally: Tally) -> None:
    """Nearly all programs are programs, most plain ones are rewritten, and twists both spoil and do not."""
    total = tally.total
    assert total["invalid"] + total["uncaptured"] < total.total() / 10, tally.table()
    plain = sum(tally.plain.values(), start=type(total)())
    assert plain["rewritten"] > plain.total() / 2, tally.table()
    bent = sum(tally.bent.values(), start=type(total)())
    assert min(bent["rewritten"], bent["untouched"]) > bent.total() / 8, tally.table()


def test_300_programs_come_out_equal_or_untouched() -> None:
    assert_telling(sweep(300))


@pytest.mark.slow
def test_10000_programs_come_out_equal_or_untouched() -> None:
    assert_telling(sweep(10_000))


@settings(max_examples=20, **QUIET)
@given(program=attentions() | indexers())
def test_verification_finds_nothing_that_the_rules_had_wrong(program: Program) -> None:
    verdict = judge(program, verify=True)
    assert verdict.kind != "wrong", verdict
    assert not any("verification" in reason for reason in verdict.reasons), verdict


@pytest.mark.parametrize(
    "lie",
    ({"scale": 0.26}, {"causal": True}, {"causal": True, "window": 2}, {"softcap": 50.0}),
    ids=str,
)
def test_the_judge_is_not_fooled_by_a_rule_that_lies(lie: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this, a judge that compares nothing would pass the fuzz."""

    def lying(rule: object) -> object:
        def find(context: Context, anchor: object) -> Site:
            site = rule.find(context, anchor)  # type: ignore[attr-defined]
            return dataclasses.replace(site, attributes=site.attributes | lie)

        return dataclasses.replace(rule, find=find)  # type: ignore[type-var]

    honest = Attention(scale=0.25)
    assert judge(honest).kind == "rewritten"
    monkeypatch.setattr("kreg.rewriters.find.RULES", [lying(r) if r.op.name == "attention" else r for r in RULES])
    assert judge(honest).kind == "wrong"


@settings(max_examples=100, **QUIET)
@given(program=programs())
@example(program=Attention(masks=(Mask(), Mask("padding", value=-1e4)), twists=("q: leaked",)))
def test_a_program_prints_as_the_code_that_makes_it(program: Program) -> None:
    assert eval(repr(program)) == program


def test_every_twist_can_be_drawn() -> None:
    """With a program that it fits; the drawing itself is of names that fit."""
    anything = (Attention(ratio=2, masks=(Mask(),)), Attention(product="sdpa"), Indexed())
    unfit = [name for name, twist in TWISTS.items() if not any(twist.needs(program) for program in anything)]
    assert not unfit
