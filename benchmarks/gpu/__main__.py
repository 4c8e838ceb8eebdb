"""The driver: `python -m benchmarks.gpu OUT`, ten minutes of a GPU from beginning to end.

Runs the parts one after the other (`benchmarks.gpu.parts`), each as a process with a limit. A part
prints a line of JSON for each figure; it stands in OUT/results.jsonl the moment it is there, so
that whatever ends the machine loses none. OUT/results.md is written last, and after SIGTERM, too;
OUT/log.txt has all that the parts said. A first call, `--first true`, takes 100 seconds and tells
whether the machine is fit for the long one; `--tiny true` rehearses either on any machine.

On a machine with torch but without the rest, and without a network, `benchmarks/gpu.sh` installs
the rest from a folder of wheels first (`benchmarks/wheels.sh`).
"""

import difflib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu.parts import FIRST, LONG, Part
from benchmarks.gpu.say import MARK
from benchmarks.gpu.table import table
from selfdistill.data import cli
from selfdistill.data.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
#: Seconds that a part has to end after it was asked to.
GRACE = 5.0


class Results:
    """What came out so far.

    Args:
        out: gets results.jsonl, results.md and log.txt.
    """

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        taken = out / "results.jsonl"
        if taken.exists():
            raise UserError(f"{taken} is there: name another folder, or remove it")
        self.records: list[dict[str, Any]] = []
        self._file = taken.open("a", encoding="utf-8")
        self.log = (out / "log.txt").open("a", encoding="utf-8")

    def add(self, record: dict[str, Any]) -> None:
        """Takes in a figure, and puts it on the disk."""
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self, parts: tuple[Part, ...]) -> None:
        """Writes the table."""
        titles = {part.name: part.title for part in parts}
        (self.out / "results.md").write_text(table(self.records, titles), encoding="utf-8")
        self._file.close()
        self.log.close()


def _listen(part: Part, stream: IO[str], results: Results) -> None:
    """Takes figures out of what a part says."""
    for line in stream:
        try:
            record = json.loads(line.removeprefix(MARK)) if line.startswith(MARK) else None
        except ValueError:  # of a part that was ended amid the line
            record = None
        if record is not None:
            results.add({"part": part.name, **record})
            shown = {k: v for k, v in record.items() if k not in ("name", "unit")}
            print(f"  {record['name']}: {json.dumps(shown)} {record.get('unit', '')}", flush=True)
        else:
            results.log.write(line)
            results.log.flush()


def run(part: Part, limit: float, tiny: bool, results: Results) -> None:
    """Runs one part; how it ended is a record, too."""
    print(f"{part.name}: {part.title} (at most {limit:.0f} s)", flush=True)
    results.log.write(f"\n== {part.name}: {' '.join(part.command(tiny)[1:])}\n")
    began = time.monotonic()
    process = subprocess.Popen(
        part.command(tiny),
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    listener = threading.Thread(target=_listen, args=(part, process.stdout, results))
    listener.start()
    late = False
    try:
        process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        late = True
    finally:
        _end(process)
    listener.join(GRACE)
    # 5: pytest found none to run, as on a machine without a GPU.
    good = process.returncode == 0 or (tiny and process.returncode == 5)
    state = "time is up" if late else "done" if good else f"exit code {process.returncode}"
    results.add({"part": part.name, "name": "state", "state": state, "seconds": _since(began)})
    print(f"{part.name}: {state} after {_since(began):.0f} s", flush=True)


def _since(began: float) -> float:
    return round(time.monotonic() - began, 1)


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a part's process and those that it began."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=GRACE)
        except ProcessLookupError:
            process.wait()
            return
        except subprocess.TimeoutExpired:
            continue


def chosen(names: str, parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """The parts of these names, between commas; all of none.

    Raises:
        UserError: there is none of a name.
    """
    known = {part.name: part for part in parts}
    asked = [name for name in names.split(",") if name]
    for name in asked:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"--only {name}: there are {', '.join(known)}{hint}")
    return tuple(part for part in parts if not asked or part.name in asked)


def main(
    out: str, first: bool = False, tiny: bool = False, seconds: int = 540, only: str = ""
) -> None:
    """Runs the parts.

    Args:
        out: folder for the results, which it must not hold yet.
        first: the short call.
        tiny: tiny models and data: a rehearsal, on a machine that may be slow to start Python.
        seconds: after which nothing is run any more.
        only: parts, between commas, in place of all.
    """
    parts = chosen(only, FIRST if first else LONG)
    results = Results(Path(out))
    end = time.monotonic() + seconds

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    spare, patience = 0.0, 4 if tiny else 1
    try:
        for part in parts:
            left = end - time.monotonic() - GRACE
            planned = patience * part.seconds
            limit = min(left, planned + spare)
            if limit < GRACE:
                results.add({"part": part.name, "name": "state", "state": "no time left"})
                continue
            began = time.monotonic()
            run(part, limit, tiny, results)
            spare += planned - (time.monotonic() - began)
    except KeyboardInterrupt:
        results.add({"part": "driver", "name": "state", "state": "interrupted"})
    finally:
        results.close(parts)
    print((Path(out) / "results.md").read_text(encoding="utf-8"))
    failed = [r["part"] for r in results.records if r.get("state", "done") != "done"]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    cli.run(main)
