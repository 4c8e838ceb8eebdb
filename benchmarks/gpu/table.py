"""The results as a page of Markdown."""

from __future__ import annotations

from typing import Any

from benchmarks.record import markdown

_KNOWN = {"part", "name", "unit", "value", "min", "max", "n", "base", "failed"}


def table(records: list[dict[str, Any]], titles: dict[str, str]) -> str:
    """A table for each part, its figures in the order in which they came.

    Args:
        records: the lines of results.jsonl.
        titles: of the parts, by name.
    """
    values = {f"{r['part']}: {r['name']}": r["value"] for r in records if "value" in r}
    pages = []
    for part in dict.fromkeys(r["part"] for r in records):
        mine = [r for r in records if r["part"] == part]
        state = next((r for r in mine if r["name"] == "state"), {"state": "not ended"})
        took = f", {state['seconds']:.0f} s" if "seconds" in state else ""
        lines = [[r["name"], *_figures(r, values)] for r in mine if "value" in r or "failed" in r]
        head = f"## {titles.get(part, part)} ({part}): {state['state']}{took}"
        columns = ["", "median (least to greatest)", "unit", "n", "ratio", "beside"]
        pages.append(head + ("\n\n" + markdown(columns, lines) if lines else ""))
    return "\n\n".join(pages) + "\n"


def _figures(record: dict[str, Any], values: dict[str, float]) -> list[str]:
    if "failed" in record:
        return [f"failed: {record['failed'][:160]}".replace("|", "/"), "", "", "", ""]
    base = values.get(record.get("base", ""))
    ratio = f"{record['value'] / base:.2f} x {record['base']}" if base else ""
    beside = ", ".join(f"{k} {_short(v)}" for k, v in record.items() if k not in _KNOWN)
    span = f" ({_short(record['min'])} to {_short(record['max'])})" if record["n"] > 1 else ""
    return [_short(record["value"]) + span, record["unit"], str(record["n"]), ratio, beside]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value).replace("|", "/")
