"""A sweep as an HTML page and as Markdown: `python -m experiments.report runs/experiments`.

It is made from what is there, at any moment; the same folder gives the same report.
"""

import datetime
from pathlib import Path
from typing import Any

from selfdistill.data import cli
from selfdistill.engine.checkpoints.files import write_text
from selfdistill.experiments import state
from selfdistill.experiments.report import analysis as report_analysis
from selfdistill.experiments.report import differences as report_differences
from selfdistill.experiments.report import html as report_html
from selfdistill.experiments.report import markdown as report_markdown
from selfdistill.experiments.report import search as report_search
from selfdistill.experiments.report import settings as report_settings
from selfdistill.experiments.report import sweep as report_sweep
from selfdistill.experiments.report import tables as report_tables
from selfdistill.experiments.report.blocks import (
    Block,
    Entry,
    Grid,
    Line,
    Report,
    Section,
    Text,
    notes,
)
from selfdistill.experiments.report.claims import answers, pages, verdict
from selfdistill.experiments.report.numbers import NONE
from selfdistill.experiments.report.sweep import Contents

TITLE = "Self-distillation for further pre-training"
NOTHING = "Nothing is complete yet: no cell of any table has all its seeds."


def build(contents: Contents) -> Report:
    """The report of what was read."""
    verdicts = verdict.every(contents)
    sections = [
        answers.section(contents, verdicts),
        *pages.section(contents, verdicts),
        overview(contents),
        *report_tables.sections(contents),
        *report_differences.sections(contents),
        *report_analysis.sections(contents),
        *report_search.search(contents),
        *report_search.cost(contents),
        *report_settings.settings(contents),
        *report_settings.missing(contents),
        *report_settings.commands(contents),
    ]
    done = sum(status == "done" for status in contents.status.values())
    lead = f"Profile {contents.profile.name}; {done} of {len(contents.jobs)} jobs complete."
    return Report(TITLE, lead, sections)


def overview(contents: Contents) -> Section:
    """What was run, where, when, with what; and the outcome in short."""
    blocks: list[Block] = []
    if not any(one.status == "done" for one in contents.outcomes):
        blocks.append(Text([NOTHING]))
    summary = report_differences.in_short(contents)
    if summary:
        blocks.append(Text(summary))
        blocks += notes(report_differences.shared(contents))
    results = _results(contents)
    counts = {
        word: sum(status == key for status in contents.status.values())
        for key, word in (
            ("done", "complete"),
            ("failed", "failed"),
            ("blocked", "blocked by a failed one"),
            ("open", "not complete"),
        )
    }
    facts = {
        "tables": "; ".join(t.table.title for t in contents.tables) or NONE,
        "profile": f"{contents.profile.name}: {contents.profile.title}",
        "data sets": "; ".join(
            d.title + (" (missing)" if d in contents.absent else "")
            for d in contents.datasets.values()
        )
        or NONE,
        "jobs": ", ".join(f"{n} {word}" for word, n in counts.items() if n) or "none",
        "seeds": _seeds(contents),
        "dates": _dates(contents),
        "device": _told(results, lambda r: r.get("device")),
        "processes of a job": _told(results, lambda r: r.get("world")),
        "precision": _told(results, lambda r: r.get("precision")),
        "ZeRO": _told(results, lambda r: r.get("zero")),
        "versions": _versions(results),
        "folder": str(contents.root),
        "data": str(contents.sweep.data_root),
    }
    lines = [Line([Entry(name), Entry(value)]) for name, value in facts.items()]
    head = [Entry("what was run"), Entry("")]
    return Section("overview", "Overview", [*blocks, Grid(head, lines, labels=2)])


def _results(contents: Contents) -> list[dict[str, Any]]:
    """Everything that jobs and seeds left as a result.json."""
    found = [result for one in contents.outcomes for result in one.results.values()]
    known = (job.result(contents.root) for job in contents.jobs if job.stage != "finetune")
    return found + [result for result in known if result is not None]


def _told(results: list[dict[str, Any]], what: Any) -> str:
    """Every value that the results have, most of them one."""
    values = [str(v) for v in map(what, results) if v is not None]
    return "; ".join(sorted(set(values))) or NONE


def _versions(results: list[dict[str, Any]]) -> str:
    found: dict[str, set[str]] = {}
    for result in results:
        for package, version in result.get("versions", {}).items():
            found.setdefault(package, set()).add(str(version))
    return ", ".join(f"{p} {' and '.join(sorted(v))}" for p, v in found.items()) or NONE


def _seeds(contents: Contents) -> str:
    seeds = sorted({seed for one in contents.outcomes for seed in one.results})
    return ", ".join(map(str, seeds)) or NONE


def _dates(contents: Contents) -> str:
    """From the first job's start to the last one's end, in UTC; of those that have a record."""
    records = [state.read(contents.root, job) for job in contents.jobs]
    began = [float(r["began"]) for r in records if "began" in r]
    if not began:
        return NONE
    # What was interrupted began long before the launch that its seconds are of.
    ended = [
        float(r.get("started", r["began"])) + float(r.get("seconds", 0))
        for r in records
        if "began" in r
    ]
    first, last = (
        datetime.datetime.fromtimestamp(t, datetime.UTC).strftime("%Y-%m-%d %H:%M")
        for t in (min(began), max(ended))
    )
    return f"{first} to {last} UTC"


def write(report: Report, folder: Path) -> list[Path]:
    """Writes report.html, report.md and figures/, paths from here; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        folder / "report.html": report_html.render(report),
        folder / "report.md": report_markdown.render(report),
    }
    drawings = report.drawings()
    if drawings:
        (folder / report_markdown.FIGURES).mkdir(exist_ok=True)
    for one in drawings:
        files[folder / report_markdown.FIGURES / f"{one.name}.svg"] = one.svg
    # As one would type them: the page may be shown to others.
    here = f"{Path.cwd()}/"
    for path, text in files.items():
        write_text(path, text.replace(here, ""))
    return list(files)


def main(sweep: str, output: str | None = None, data_root: str | None = None) -> None:
    """Writes report.html, which needs nothing else, and report.md with its figures beside it.

    Args:
        sweep: the sweep's folder, such as runs/experiments.
        output: folder of the report (default: report, in the sweep's folder).
        data_root: where the packed data sets are now, if no longer where they were.
    """
    root = Path(sweep).absolute()
    contents = report_sweep.read(root, Path(data_root).absolute() if data_root else None)
    folder = Path(output) if output else root / "report"
    files = write(build(contents), folder)
    done = sum(status == "done" for status in contents.status.values())
    print(f"{files[0]}: {done} of {len(contents.jobs)} jobs complete; Markdown: {files[1].name}")


if __name__ == "__main__":
    cli.run(main)
