"""Plans: who is eligible, which assignment is best, and that every kernel not taken has its reason."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kreg.errors import SelectionError, SpecError
from kreg.registry.assignment import assign
from kreg.registry.catalogue import Catalogue
from kreg.registry.constraints import SymbolicSize
from kreg.registry.environment import Environment
from kreg.registry.op import Op
from kreg.registry.plan import Choice, Plan, SiteFacts, make_plan
from kreg.registry.selection import selection_from_environment
from kreg.registry.spec import KernelSpec

CPU = Environment.detect("cpu")


def spec(name: str, **more: Any) -> KernelSpec:
    given_fields = {
        "op": "attention",
        "entry": "acme:f",
        "devices": ["cpu"],
        "dtypes": ["float32"],
        "trains": True,
    }
    return KernelSpec(**{**given_fields, "name": name, **more})


def catalogue_of(*specs: KernelSpec) -> Catalogue:
    """kreg's ops and these kernels alone."""
    known = Catalogue()
    for op in Catalogue.builtin(packages=False).ops.values():
        known.add_op(op)
    known.add_all(specs, "test")
    return known


def attention(site: str = "site", **more: Any) -> SiteFacts:
    dims: dict[str, Any] = {
        "batch": 1,
        "heads": 4,
        "kv_heads": 4,
        "queries": 256,
        "keys": 256,
        "head_dim": 64,
        "value_dim": 64,
    }
    attributes: dict[str, Any] = {"scale": 0.1, "softcap": 0.0, "causal": True, "window": 0, "offset": 0}
    attributes |= {"has_bias": False, "has_mask": False, "has_sinks": False}
    dims |= {k: v for k, v in more.items() if k in dims}
    attributes |= {k: v for k, v in more.items() if k in attributes}
    return SiteFacts(site, "attention", dims, attributes, more.get("dtype", torch.float32), more.get("trainable", True))


def deepseek(site: str = "sas", queries: Any = 4096, entries: Any = 1024, **more: Any) -> SiteFacts:
    """A compressed sparse attention as MindSpeed takes it."""
    dims = {
        "batch": 1,
        "heads": 64,
        "queries": queries,
        "keys": queries,
        "head_dim": 512,
        "entries": entries,
        "selected": 512,
    }
    attributes = {"scale": 0.04, "window": 128, "ratio": 4, "offset": 0} | {
        f"has_{name}": name != "padding" for name in ("compressed", "indices", "sinks", "padding")
    }
    return SiteFacts(site, "sparse_attention", dims, attributes | more, torch.bfloat16, True)


def indexer(site: str = "li", queries: Any = 4096, entries: Any = 1024, **more: Any) -> SiteFacts:
    """A lightning indexer as MindSpeed takes it."""
    dims = {"batch": 1, "queries": queries, "index_heads": 64, "index_dim": 128, "entries": entries}
    attributes = {"scale": 0.09, "topk": 512, "ratio": 4, "offset": 0, "scored": False}
    attributes |= {"sentinel": True, "has_padding": False, "has_ends": False}
    return SiteFacts(site, "lightning_indexer", dims, attributes | more, torch.bfloat16, True)


def the(plan: Plan, site: str = "site") -> Choice:
    return plan.choices[site]


def name(choice: Choice) -> str | None:
    return choice.kernel.name if choice.kernel else None


def reasons(choice: Choice) -> dict[str, str]:
    return {r.kernel: r.reason for r in choice.rejected}


# ---- eligibility


@pytest.mark.parametrize(
    ("kernel", "site", "reason"),
    [
        ({"devices": ["cuda"]}, {}, "it runs on cuda, not on cpu"),
        ({"architectures": ["sm_90"]}, {}, "it needs sm_90, the cpu device is"),
        ({"dtypes": ["bfloat16", "float16"]}, {}, "it takes bfloat16, float16, not float32"),
        ({"trains": False}, {}, "it does not train, and gradients flow through this site"),
        ({"requires": ["no-such-package>=2"]}, {}, 'pip install "no-such-package>=2"'),
        (
            {"constraints": ["head_dim % 16 == 0 and head_dim <= 256"]},
            {"head_dim": 512},
            "head_dim <= 256 does not hold: head_dim is 512",
        ),
        (
            {"constraints": ["not has_mask"]},
            {"has_mask": True},
            "not has_mask does not hold: has_mask is True",
        ),
        (
            {"constraints": ["keys <= 64"]},
            {"keys": SymbolicSize("s", 65, 128)},
            "keys <= 64 does not hold: keys is s (from 65 to 128)",
        ),
    ],
)
def test_a_kernel_that_a_site_cannot_use_is_rejected_in_words(
    kernel: dict[str, Any], site: dict[str, Any], reason: str
) -> None:
    plan = make_plan([attention(**site)], catalogue_of(spec("acme.k", **kernel)), CPU)
    assert name(the(plan)) is None
    assert reason in reasons(the(plan))["acme.k"]
    assert "no kernel of attention can be used here" in the(plan).reason


def test_all_reasons_of_a_rejection_are_given() -> None:
    kernel = spec("acme.k", dtypes=["float16"], trains=False, constraints=["window == 128", "causal"])
    found = reasons(the(make_plan([attention()], catalogue_of(kernel), CPU)))["acme.k"]
    assert len(found.split("; ")) == 3


def test_a_site_without_gradients_may_use_a_kernel_that_does_not_train() -> None:
    plan = make_plan([attention(trainable=False)], catalogue_of(spec("acme.k", trains=False)), CPU)
    assert name(the(plan)) == "acme.k"


def test_what_cannot_be_decided_is_checked_at_call_time() -> None:
    kernel = spec("acme.k", constraints=["keys % 16 == 0", "head_dim <= 256", "queries == keys"])
    size = SymbolicSize("s0", 1, None, hint=256)
    choice = the(make_plan([attention(queries=size, keys=size)], catalogue_of(kernel), CPU))
    assert name(choice) == "acme.k" and choice.checks == ("keys % 16 == 0",)


def test_an_op_without_kernels_keeps_its_code() -> None:
    choice = the(make_plan([attention()], catalogue_of(), CPU))
    assert name(choice) is None and choice.reason.startswith("no kernel of attention is registered")


def test_a_device_that_is_not_here_gets_no_kernel_and_a_supposed_one_does() -> None:
    known = catalogue_of(spec("acme.k", devices=["mtia"], requires=["no-such-package"]))
    real, supposed = (
        make_plan([attention()], known, e) for e in (Environment.detect("mtia"), Environment.supposed("mtia"))
    )
    assert real.kernels == () and "there is no mtia device here" in reasons(the(real))["acme.k"]
    assert supposed.kernels == ("acme.k",) and supposed.device == "mtia"


# ---- cost


def test_the_kernel_of_least_estimated_cost_is_taken_and_the_others_say_by_how_much() -> None:
    known = catalogue_of(
        spec("acme.slow", cost={"efficiency": 0.1}),
        spec("acme.fast", cost={"efficiency": 0.6}),
    )
    choice = the(make_plan([attention()], known, CPU))
    assert name(choice) == "acme.fast" and "the least of 2 estimates" in choice.reason
    assert "us, against" in reasons(choice)["acme.slow"]
    assert choice.cost_us is not None and choice.cost_us > 0


def test_a_large_overhead_loses_on_small_sizes_and_wins_on_large_ones() -> None:
    known = catalogue_of(
        spec("acme.light", cost={"efficiency": 0.1, "overhead_us": 0}),
        spec("acme.heavy", cost={"efficiency": 1.0, "overhead_us": 500}),
    )
    small, large = attention("small", queries=8, keys=8), attention("large", queries=4096, keys=4096)
    plan = make_plan([small, large], known, CPU)
    assert (name(the(plan, "small")), name(the(plan, "large"))) == ("acme.light", "acme.heavy")


def test_a_symbolic_size_counts_by_its_hint() -> None:
    known = catalogue_of(spec("acme.k"))
    costs = [
        the(make_plan([attention(queries=q, keys=q)], known, CPU)).cost_us
        for q in (2048, SymbolicSize("s", 1, None, hint=2048), SymbolicSize("s", 1, None))
    ]
    assert costs[0] == costs[1] and costs[2] is not None


def test_a_kernel_is_taken_even_where_its_declared_cost_is_above_that_of_the_original_code() -> None:
    known = catalogue_of(spec("acme.k", cost={"efficiency": 0.001, "overhead_us": 1e6}))
    assert name(the(make_plan([attention(queries=1, keys=1)], known, CPU))) == "acme.k"


def test_a_work_function_that_fails_is_the_ops_fault_and_says_so() -> None:
    known = catalogue_of()
    known.add_op(
        Op("acme_op", "", "(Tensor x) -> (Tensor y)", {"x": "n"}, (), lambda x: (x,), lambda x: (x,),
           lambda dtype, generator: iter(()), lambda dims, attributes: (dims["missing"], 0.0))
    )  # fmt: skip
    with pytest.raises(SpecError, match="op 'acme_op': its work function fails on site 'site'"):
        make_plan([SiteFacts("site", "acme_op", {"n": 3}, {}, torch.float32, False)], known, CPU)


# ---- exclusions


def test_kernels_that_exclude_each_other_are_never_both_used_and_the_report_says_what_was_given_up() -> None:
    known, npu = Catalogue.builtin(packages=False), Environment.supposed("npu")
    plan = make_plan([deepseek(), indexer()], known, npu, disable=["torch_npu.*"])
    assert plan.kernels == ("mindspeed.sas",)
    told = reasons(the(plan, "li"))["mindspeed.li"]
    assert "mindspeed.sas exclude each other" in told and "used at sas" in told and "us without mindspeed.sas" in told
    assert "it excludes mindspeed.li, given up at li" in the(plan, "sas").reason


def test_where_another_kernel_serves_one_of_the_two_both_sites_are_served() -> None:
    plan = make_plan([deepseek(), indexer()], Catalogue.builtin(packages=False), Environment.supposed("npu"))
    assert name(the(plan, "li")) == "mindspeed.li" and name(the(plan, "sas")).startswith("torch_npu.")
    assert "mindspeed.li is used at li" in reasons(the(plan, "sas"))["mindspeed.sas"]


def test_the_whole_graph_is_weighed_not_each_site() -> None:
    known = catalogue_of(
        spec("a.one", constraints=["window == 1"], excludes=["tag:b"], cost={"efficiency": 1.0}),
        spec("b.two", constraints=["window == 2"], tags=["b"], cost={"efficiency": 0.5}),
    )
    one = attention("one", window=1)
    two = [attention(f"two{i}", window=2) for i in range(3)]
    assert make_plan([one, *two], known, CPU).kernels == ("b.two",)
    assert make_plan([one], known, CPU).kernels == ("a.one",)


def test_a_site_falls_back_to_a_kernel_that_nothing_excludes() -> None:
    known = catalogue_of(
        spec("a.one", constraints=["window == 1"], excludes=["b.best"], cost={"efficiency": 1.0}),
        spec("b.best", constraints=["window == 2"], cost={"efficiency": 0.9}),
        spec("b.plain", constraints=["window == 2"], cost={"efficiency": 0.8}),
    )
    plan = make_plan([attention("one", window=1), attention("two", window=2)], known, CPU)
    assert plan.kernels == ("a.one", "b.plain")
    assert "a.one is used at one" in reasons(the(plan, "two"))["b.best"]


NUMBERS_OF_SITES, NUMBER_OF_KERNELS = 3, 5
KERNELS = [f"k{i}" for i in range(NUMBER_OF_KERNELS)]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.dictionaries(st.sampled_from(KERNELS), st.integers(0, 20)), min_size=1, max_size=NUMBERS_OF_SITES),
    st.lists(st.integers(0, 40), min_size=NUMBERS_OF_SITES, max_size=NUMBERS_OF_SITES),
    st.sets(st.tuples(st.sampled_from(KERNELS), st.sampled_from(KERNELS)).filter(lambda p: p[0] != p[1])),
)
def test_no_valid_assignment_costs_less(
    offers: Sequence[dict[str, int]], references: Sequence[int], pairs: set[tuple[str, str]]
) -> None:
    costs = {f"s{i}": {k: float(c) for k, c in offer.items()} for i, offer in enumerate(offers)}
    reference = {f"s{i}": float(references[i]) for i in range(len(offers))}
    both = pairs | {(b, a) for a, b in pairs}
    conflicts = {k: frozenset(b for a, b in both if a == k) for k in KERNELS}
    found = assign(costs, reference, conflicts)

    def cost(kernels: Sequence[str | None]) -> float:
        used = set(kernels) - {None}
        if any(b in used for a in used for b in conflicts[str(a)]):
            return float("inf")
        return sum(reference[s] if k is None else costs[s][k] for s, k in zip(costs, kernels, strict=True))

    best = min(cost(kernels) for kernels in itertools.product(*([*offer, None] for offer in costs.values())))
    assert found.cost_us == best == cost(list(found.kernels.values()))


# ---- enable and disable

PAIR = (
    spec("acme.cheap", cost={"efficiency": 1.0, "overhead_us": 0}),
    spec("acme.dear", cost={"efficiency": 0.01, "overhead_us": 900}),
    spec("other.one", cost={"efficiency": 0.5}, excludes=["acme.cheap"]),
)


def test_an_enabled_kernel_is_taken_wherever_it_is_eligible_at_any_cost() -> None:
    plan = make_plan([attention()], catalogue_of(*PAIR), CPU, enable=("acme.dear",))
    assert name(the(plan)) == "acme.dear" and the(plan).reason == "it is enabled"
    assert reasons(the(plan))["acme.cheap"] == "acme.dear is enabled, and so preferred"


def test_a_pattern_enables_a_whole_provider() -> None:
    assert make_plan([attention()], catalogue_of(*PAIR), CPU, enable="other.*").kernels == ("other.one",)


def test_what_an_enabled_kernel_excludes_is_off_everywhere() -> None:
    known = catalogue_of(
        spec("a.one", constraints=["window == 1"], excludes=["b.two"]),
        spec("b.two", constraints=["window == 2"]),
    )
    sites = [attention("one", window=1), *(attention(f"two{i}", window=2) for i in range(5))]
    plan = make_plan(sites, known, CPU, enable=["a.one"])
    assert plan.kernels == ("a.one",)
    assert reasons(the(plan, "two0"))["b.two"] == "it and a.one exclude each other, and a.one is enabled"


def test_an_enabled_kernel_that_no_site_can_use_changes_nothing_and_the_plan_says_why() -> None:
    known = catalogue_of(spec("a.gpu", devices=["cuda"], excludes=["b.cpu"]), spec("b.cpu"))
    plan = make_plan([attention()], known, CPU, enable=["a.gpu"])
    assert plan.kernels == ("b.cpu",)
    assert plan.unused == {"a.gpu": "it runs on cuda, not on cpu"}
    assert make_plan([], known, CPU, enable=["a.gpu"]).unused == {"a.gpu": "no site computes attention"}


@pytest.mark.parametrize("enable", [("mindspeed.sas", "mindspeed.li"), ("mindspeed.*",), "mindspeed.li,mindspeed.sas"])
def test_enabling_two_kernels_that_exclude_each_other_names_both_and_how_to_choose(enable: Any) -> None:
    known = Catalogue.builtin(packages=False)
    with pytest.raises(SelectionError) as caught:
        make_plan([], known, CPU, enable=enable)
    assert isinstance(caught.value, ValueError)
    message = str(caught.value)
    assert "mindspeed.sas" in message and "mindspeed.li" in message and "exclude each other" in message
    assert "enable only" in message


def test_disabling_one_of_two_that_a_pattern_enables_is_a_way_to_choose() -> None:
    known = Catalogue.builtin(packages=False)
    plan = make_plan(
        [deepseek(), indexer()],
        known,
        Environment.supposed("npu"),
        enable="mindspeed.*",
        disable="mindspeed.sas",
    )
    assert name(the(plan, "li")) == "mindspeed.li" and reasons(the(plan, "sas"))["mindspeed.sas"] == "it is disabled"


def test_disabling_everything_leaves_the_original_code() -> None:
    plan = make_plan([attention()], catalogue_of(*PAIR), CPU, disable=("*",))
    assert plan.kernels == () and set(reasons(the(plan)).values()) == {"it is disabled"}


@pytest.mark.parametrize("argument", ["enable", "disable"])
def test_an_unknown_name_is_refused_with_the_nearest_one(argument: str) -> None:
    with pytest.raises(SelectionError, match=rf"{argument}: no kernel is called 'acme\.chep' \(did you mean"):
        make_plan([], catalogue_of(*PAIR), CPU, **{argument: ("acme.chep",)})


def test_a_kernel_both_enabled_and_disabled_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"acme\.dear is both enabled and disabled"):
        make_plan([], catalogue_of(*PAIR), CPU, enable=("acme.dear",), disable=("acme.dear",))


def test_environment_variables_add_to_what_is_enabled_and_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KREG_ENABLE", " acme.a, acme.b,")
    monkeypatch.delenv("KREG_DISABLE", raising=False)
    assert selection_from_environment(("acme.b", "acme.c"), "acme.d") == (
        ("acme.b", "acme.c", "acme.a"),
        ("acme.d",),
    )


# ---- MindSpeed's specs


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"has_padding": True}, "not has_padding does not hold"),
        ({"has_sinks": False}, "has_sinks does not hold"),
        ({"window": 64}, "window == 128 does not hold: window is 64"),
        ({"ratio": 16}, "ratio in (0, 4, 128) does not hold: ratio is 16"),
        ({"has_indices": False}, "has_indices == (ratio == 4) does not hold"),
    ],
)
def test_sas_takes_only_what_mindspeed_documents(change: dict[str, Any], reason: str) -> None:
    known = Catalogue.builtin(packages=False)
    plan = make_plan([deepseek(**change)], known, Environment.supposed("npu"))
    assert reason in reasons(the(plan, "sas"))["mindspeed.sas"]


def test_sas_takes_all_three_kinds_of_layer() -> None:
    known, npu = Catalogue.builtin(packages=False), Environment.supposed("npu")
    sliding = deepseek("sliding", ratio=0, has_compressed=False, has_indices=False)
    heavy = deepseek("heavy", entries=32, ratio=128, has_indices=False)
    plan = make_plan([sliding, deepseek(), heavy], known, npu, disable=["torch_npu.*"])
    assert plan.kernels == ("mindspeed.sas",)


def test_on_dynamic_lengths_li_checks_at_call_time_that_the_ratio_divides_the_sequence() -> None:
    known = Catalogue.builtin(packages=False)
    site = indexer(queries=SymbolicSize("s0", 1, None, 4096), entries=SymbolicSize("s0//4", 0, None, 1024))
    choice = the(make_plan([site], known, Environment.supposed("npu")), "li")
    assert name(choice) == "mindspeed.li" and choice.checks == ("entries * ratio == queries",)


def test_without_an_ascend_device_the_reasons_say_what_is_missing() -> None:
    if Environment.detect("npu").present:
        pytest.skip("there is an Ascend device")
    plan = make_plan([deepseek()], Catalogue.builtin(packages=False), Environment.detect("npu"))
    told = reasons(the(plan, "sas"))["mindspeed.sas"]
    assert name(the(plan, "sas")) is None and "there is no npu device here" in told
