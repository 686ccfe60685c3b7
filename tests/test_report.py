"""The HTML report: complete in one file, escaped, with pictures that can stand beside each other."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from model_zoo import tiny_model

from pymape.masks import ModuleMasks
from pymape.metrics import Predictions
from pymape.model_layout import layout
from pymape.report import (
    Figure,
    Report,
    Row,
    Section,
    Table,
    aligned,
    evidence_section,
    flat_settings,
    run_facts,
    write_report,
)


class _Balanced(HTMLParser):
    """Collects tags and links, and checks that every element is closed."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _read(path: Path) -> _Balanced:
    parser = _Balanced()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    assert not parser.open
    return parser


def _predictions(seed: int, size: int = 20) -> Predictions:
    values = torch.rand(size, generator=torch.Generator().manual_seed(seed)).double()
    return Predictions((values > 0.5).double(), values, -values.log())


def _models() -> dict[str, dict[str, Predictions]]:
    names = ("original", "unlearned", "retrained")
    return {
        name: {part: _predictions(10 * row + column) for column, part in enumerate(("forget", "retain", "test"))}
        for row, name in enumerate(names)
    }


def test_page_holds_everything_and_needs_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    masks = ModuleMasks.random(layout(tiny_model("vit")), 0.4)
    path = tmp_path / "report.html"
    table = Table(
        ("model", "UA"), [Row(("retrained", "1.5"), "reference"), Row(("gd", "2.0"), "best")], note="the note"
    )
    report = Report(
        title="A title",
        lead="The lead",
        key_figures={"records forgotten": "107"},
        sections=[
            Section("Result", "The text", tables=[table], figures=[Figure("<svg></svg>", "The caption")]),
            evidence_section("A closer look", "Seen", masks, _models()),
        ],
        settings={"masks.budget": "0.3"},
        command="pymape demo --seeds 3",
        facts={"versions": "torch 2"},
    )
    write_report(path, report)
    page = _read(path)
    text = " ".join(page.text)
    for part in (
        "A title",
        "The lead",
        "107",
        "The text",
        "retrained",
        "Marked: the best. the note",
        "The caption",
        "masks.budget",
    ):
        assert part in text
    for part in ("pymape demo --seeds 3", "torch 2", "forget set", "loss (nats)", "probability of the true class"):
        assert part in text
    assert page.tags.count("svg") == 4
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert "@import" not in path.read_text(encoding="utf-8")


def test_text_is_escaped(tmp_path: Path) -> None:
    table = Table(("<x1>",), [Row(("<x2>",))], note="<x3>")
    report = Report(
        title="<x4>&",
        lead="<x5>",
        key_figures={"<x6>": "<x7>"},
        sections=[Section("<x8>", "<x9>", tables=[table], figures=[Figure("<svg></svg>", "<x10>")])],
        settings={"<x11>": "<x12>"},
        command="a < b && c",
        facts={"<x13>": "<x14>"},
    )
    write_report(tmp_path / "report.html", report)
    page = _read(tmp_path / "report.html")
    assert not [tag for tag in page.tags if tag.startswith("x")]
    assert {f"<x{number}>" for number in range(1, 15) if number != 4} <= set(page.text)
    assert "a < b && c" in page.text


def test_ids_of_pictures_are_unique_and_resolve(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from pymape.report.plots import bars

    shared = {"ga": {"all": [1.0, 2.0], "masks": [0.5, 0.75]}}
    figures = [Figure(bars(shared, "gap"), ""), Figure(bars({"gd": shared["ga"]}, "gap"), "")]
    section = evidence_section("", "", None, _models())
    markup = "".join(figure.svg for figure in [*figures, *section.figures])
    ids = re.findall(r'\bid="([^"]+)"', markup)
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', markup)) <= {(i, "") for i in ids} | {
        ("", i) for i in ids
    }
    assert "currentColor" in markup
    assert len(section.figures) == 2  # no masks, no picture of them


def test_pictures_survive_losses_that_are_equal_zero_or_infinite() -> None:
    pytest.importorskip("matplotlib")
    from pymape.report.plots import histograms

    flat = histograms({"a": {"x": torch.zeros(3)}, "b": {"x": torch.tensor([0.0, torch.inf])}}, "loss", log=True)
    assert flat.startswith("<svg")
    empty = histograms({"a": {"x": torch.full((2,), torch.nan)}}, "loss")
    assert empty.startswith("<svg")


def test_dots_are_joined_in_the_colour_of_the_closer_side() -> None:
    pytest.importorskip("matplotlib")
    from pymape.report.plots import _COLORS, dots, standalone

    rows = {
        "a task": {"before": 50.0, "all": 2.0, "masks": 1.0, "again": 0.01},  # drawn at 0.1
        "another": {"before": 5.0, "all": 2.0, "masks": 3.0},
    }
    markup = dots(rows, "gap", ("masks", "all"))
    joins = re.findall(r"stroke: (#\w+); stroke-opacity: 0.45", markup)
    assert joins == [_COLORS[0], _COLORS[1]]
    assert all(f">{name}<" in markup for name in (*rows, "before", "all", "masks", "again", "gap"))
    assert standalone(markup).startswith('<svg style="background: white; color: black"')


def test_tables_line_up() -> None:
    assert aligned([("model", "UA"), ("gd", "100.0")]) == ["model     UA", "gd     100.0"]


def test_settings_carry_the_names_of_flags() -> None:
    config = {"lr": 0.1, "masks": {"budget": 0.3, "file": None}, "lrs": [1, 2]}
    assert flat_settings(config) == {"lr": "0.1", "masks.budget": "0.3", "masks.file": "default", "lrs": "1, 2"}


def test_facts_leave_out_what_is_unknown() -> None:
    machine = {"system": "Linux", "architecture": "x86_64", "threads": 2, "accelerator": None}
    facts = run_facts({"date": "d", "versions": {"torch": "2"}, "commit": None, "machine": machine})
    assert facts == {"date": "d", "versions": "torch 2", "machine": "Linux x86_64, 2 threads"}
