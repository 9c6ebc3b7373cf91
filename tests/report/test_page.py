"""The page: whole in one file, safe to open, with a card and a mark for every site."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from kreg.rewriters.report import Report
from kreg.rewriters.report.lines import line_of

from .samples import attention, mixed, report

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what the tests ask about."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.hrefs: list[str] = []
        self.sources: list[str] = []
        self.scripts = 0
        self.feed(html)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.stack.append(tag)
        self.scripts += tag == "script"
        for name, value in attrs:
            assert not name.startswith("on"), "no event handlers in the markup"
            if name == "id":
                self.ids.append(str(value))
            if name == "href":
                self.hrefs.append(str(value))
            if name in ("src", "srcset", "data", "action"):
                self.sources.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.stack.pop() == tag


@pytest.fixture(params=["three", "forty", "mixed", "empty", "dry"])
def made(request: pytest.FixtureRequest) -> Report:
    return {
        "three": report(3),
        "forty": report(40),
        "mixed": mixed(),
        "empty": report(0),
        "dry": report(3, dry_run=True),
    }[request.param]


def test_the_page_is_well_formed_and_loads_nothing(made: Report) -> None:
    html = made.to_html()
    page = Page(html)
    assert not page.sources and page.scripts == 1
    assert all(href.startswith("#") or href == "data:," for href in page.hrefs)
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    assert len(set(page.ids)) == len(page.ids)


def test_every_mark_leads_to_a_site_and_every_site_has_one(made: Report) -> None:
    page = Page(made.to_html())
    assert {href[1:] for href in page.hrefs if href.startswith("#")} <= set(page.ids)
    assert sum(name.startswith("site-") for name in page.ids) == len(made.sites)
    assert sum(href.startswith("#site-") for href in page.hrefs) == len(made.sites)


def test_hostile_names_are_text() -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    site = attention(0, "csa", module=f"m.{evil}", reason=evil, before=(evil,), after=(evil,), id=evil)
    made = report(0, sites=(site, *mixed().sites[:2]), model=evil)
    miss = mixed().near_misses[0].model_copy(update={"module": evil, "reason": evil, "node": evil})
    html = made.model_copy(update={"near_misses": (miss,)}).to_html()
    page = Page(html)
    assert page.scripts == 1 and not page.sources and "<img" not in html


def test_a_card_tells_the_kernel_the_reason_the_errors_and_the_nodes() -> None:
    html = report(3).to_html()
    for text in ("kreg.tiled_sparse_attention", "the only kernel that this site can use", "3.1e-07"):
        assert text in html
    assert "<b>57 nodes</b> became <b>1</b>" in html
    assert "2e-06 + 2e-05 of the largest value" in html
    assert "the 512 selected of the compressed entries of 4 keys each that are ready" in html


def test_near_misses_name_node_and_source_line() -> None:
    html = mixed().to_html()
    assert "softmax_45" in html and "modeling_x.py:212" in html


@pytest.mark.parametrize(
    ("text", "name", "target", "arguments"),
    [
        (
            "%mul : [num_users=1] = call_function[target=torch.ops.aten.mul.Tensor](args = (%x, 0.5), kwargs = {})",
            "%mul",
            "aten.mul.Tensor",
            "(%x, 0.5)",
        ),
        (
            "%neg : [num_users=2] = call_function[target=torch.ops.aten.neg.default](args = (%x,), kwargs = {})",
            "%neg",
            "aten.neg",
            "(%x)",
        ),
        (
            "%op : [num_users=1] = call_function[target=torch.ops.kreg.attention.default]"
            "(args = (%q, [1, 2]), kwargs = {window: 128, kernel: torch.sdpa})",
            "%op",
            "kreg.attention",
            "(%q, [1, 2], window=128, kernel=torch.sdpa)",
        ),
        ("%x : f32[2] = aten.relu(%y)", "%x : f32[2]", "", "aten.relu(%y)"),
        ("something else", "", "", "something else"),
    ],
)
def test_nodes_are_written_as_calls(text: str, name: str, target: str, arguments: str) -> None:
    line = line_of(text)
    assert (line.name, line.target, line.arguments) == (name, target, arguments)


def test_an_enabled_kernel_that_no_site_uses_is_on_the_page() -> None:
    page = report(3, unused={"mindspeed.li": "no site computes <lightning_indexer>"}).to_html()
    assert "mindspeed.li" in page and "no site computes &lt;lightning_indexer&gt;" in page
    assert "used at no site" not in report(3).to_html()
