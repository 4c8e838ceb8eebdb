"""The report of a sweep as files: its page, its Markdown, at any moment of a sweep."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt

from selfdistill.data import cli
from selfdistill.experiments import results
from selfdistill.experiments.report import __main__ as report
from selfdistill.experiments.report import html as report_html
from selfdistill.experiments.report import markdown as report_markdown
from selfdistill.experiments.report import numbers as report_numbers
from selfdistill.experiments.report import sweep as report_sweep
from selfdistill.experiments.report.blocks import Entry, Grid, Line, Report, Section, Text
from selfdistill.experiments.state import Asked, Sweep
from tests.kit.report import (
    Tags,
    finish,
    grids,
    look,
    run_all,
    said,
    section,
    stands,
    sweep_of,
)


@pytest.fixture(scope="module")
def folder(sweep: Sweep, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    cli.run(report.main, [str(sweep.root), "--output", str(out)])
    return out


def test_the_page_is_well_formed_and_needs_nothing_else(folder: Path, built: Report) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    found = Tags()
    found.feed(page)
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    assert found.links
    assert all(link.startswith("#") and link[1:] in found.ids for link in found.links)
    assert not found.tags & {"link", "script", "img", "iframe", "object", "embed"}
    assert not re.search(r"@import|url\((?!#)|https?://", page)
    assert page.count("<svg") == len(built.drawings()) > 4
    assert "loss is &lt;nan&gt; | step 12" in page
    every = [g for one in built.sections for s in (one, *one.parts) for g in grids(s.blocks)]
    widths = [len(g.head) for g in every for _ in range(1 + len(g.lines))]
    assert found.rows == widths


def test_the_markdown_has_the_same_tables_and_its_figures(folder: Path, built: Report) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    cells: list[list[str]] = []
    for token, after in itertools.pairwise(tokens):
        if token.type == "tr_open":
            cells.append([])
        if token.type in ("th_open", "td_open"):
            plain = "".join(c.content for c in after.children or [])
            cells[-1].append(plain)
    every = [g for one in built.sections for s in (one, *one.parts) for g in grids(s.blocks)]
    rows = [line.entries for g in every for line in (Line(g.head), *g.lines)]
    assert len(cells) == len(rows)
    for ours, told in zip(rows, cells, strict=True):
        assert len(ours) == len(told)
        for entry, cell in zip(ours, told, strict=True):
            # Every number, name and sign arrives as it was, whatever Markdown means by it.
            for part in (entry.text, entry.more):
                assert " ".join(part.split()) in cell
    images = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(images) == len(built.drawings())
    for image in images:
        ElementTree.parse(folder / image)
    assert text.count("```") % 2 == 0
    assert not re.search(r"\n{3,}", text)


def test_words_that_mean_something_to_markdown_or_html_arrive_as_they_are() -> None:
    hostile = "A *b* _c_ **d** `e` [f](g) <b>h</b> | i \\\\ ~~j~~ {{ k }} &amp; # l"
    block = Grid([Entry("x"), Entry(hostile)], [Line([Entry(hostile), Entry("1")])], hostile)
    made = Report(hostile, hostile, [Section("s", hostile, [block, Text([hostile])])])
    text = report_markdown.render(made)
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    lines = [token.children or [] for token in tokens if token.type == "inline"]
    plain = ["".join(child.content for child in children) for children in lines]
    assert [one.rstrip(":") for one in plain if one not in ("x", "1")] == [hostile] * 7
    assert {c.type for children in lines for c in children} <= {"text", "text_special"}
    page = Tags()
    page.feed(report_html.render(made))
    assert page.text.count(hostile) >= 6


def test_the_same_folder_gives_the_same_report(
    folder: Path, sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.run(report.main, [str(sweep.root), "--output", str(tmp_path)])
    counts = stands(sweep)
    told = f"{counts['done']} of {sum(counts.values())} jobs complete"
    assert told in capsys.readouterr().out
    for path in folder.rglob("*"):
        if path.is_file():
            assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("done", [0, 1, 4, 9])
def test_any_moment_has_a_report(tmp_path: Path, done: int) -> None:
    asked = [Asked("table1", ("cub", "flowers")), Asked("figure3", ("cifar100",)), Asked("cost")]
    made = sweep_of(tmp_path, ["cub", "cifar100"], *asked)
    for job in made.plan().ordered()[:done]:
        finish(made.root, job)
    cli.run(report.main, [str(made.root)])
    page = (made.root / "report" / "report.html").read_text(encoding="utf-8")
    nothing = not list(made.root.glob("cub/fine_tuning/*/seed-0"))
    assert (report.NOTHING in page) == nothing
    Tags().feed(page)


def test_a_sweep_without_any_data_set_says_how_to_get_them(tmp_path: Path) -> None:
    made = sweep_of(tmp_path, [], Asked("table2"))
    built = report.build(report_sweep.read(made.root))
    assert "python -m data.pack FOLDER DATA_ROOT/scierc" in said(section(built, "table2"))
    assert report.NOTHING in said(section(built, "overview"))


def test_data_may_be_gone_or_elsewhere(tmp_path: Path) -> None:
    made = sweep_of(tmp_path, ["xray"], Asked("table5", ("xray",), (), 2))
    run_all(made)
    (tmp_path / "shards").rename(tmp_path / "moved")
    for place in (None, tmp_path / "moved"):
        found = report.build(report_sweep.read(made.root, place))
        (table, *_) = grids(section(found, "table5").blocks)
        assert look(table, "fine-tuning", "chest X-rays (Kermany)")
        assert "Nothing: all jobs" in said(section(found, "missing"))


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        (["{empty}"], "run experiments.run first"),
        (["{broken}"], "is not what experiments.run wrote"),
        (["{empty}", "--outptu", "x"], "Did you mean --output?"),
        ([], "SWEEP is missing"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], cure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sweep.json").write_text("{")
    names = {"empty": tmp_path, "broken": tmp_path / "broken"}
    with pytest.raises(SystemExit) as stop:
        cli.run(report.main, [word.format(**names) for word in words])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert cure in told


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0.000183, "0.00018"), (0.8021, "0.802"), (40.61, "40.6"), (1234.4, "1234"),
        (-0.004, "−0.0040"), (0.0, "0.00"), (3.2e-7, "3.2e−07"),
    ],
)  # fmt: skip
def test_numbers_keep_the_digits_that_count(value: float, told: str) -> None:
    assert report_numbers.spread(results.Sample({0: value}), "analysis.gap") == told
