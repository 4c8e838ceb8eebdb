"""Broken and hostile files end in a right result or in one line: a minute of them."""

import os
from pathlib import Path

import pytest

from tests.fuzz.harness import Target, fuzz
from tests.fuzz.targets import TARGETS

#: Of all targets together; `make fuzz` takes an hour.
SECONDS = float(os.environ.get("FUZZ_SECONDS", "60"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_nothing_but_results_and_lines(target: Target, tmp_path: Path) -> None:
    assert fuzz(target, SECONDS / len(TARGETS), 0, tmp_path) > 0


def _broken(content: bytes, folder: Path) -> None:
    if len(content) == 3:
        raise KeyError(content)


def test_what_is_found_is_kept_and_ends_the_test(tmp_path: Path) -> None:
    from tests.fuzz import harness
    from tests.fuzz.inputs import edited

    target = Target("broken", _broken, edited([b"abcd"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "FOUND", tmp_path / "found")
        with pytest.raises(KeyError):
            fuzz(target, 5, 0, tmp_path)
        (kept,) = (tmp_path / "found" / "broken").iterdir()
        assert len(kept.read_bytes()) == 3
        with pytest.raises(KeyError):
            fuzz(target, 0, 0, tmp_path)


def test_growth_and_endless_work_are_found(tmp_path: Path) -> None:
    from tests.fuzz import harness
    from tests.fuzz.inputs import edited

    grown: list[bytearray] = []

    def endless(content: bytes, folder: Path) -> None:
        while True:
            pass

    def growing(content: bytes, folder: Path) -> None:
        grown.append(bytearray(b"x" * 2**26))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "FOUND", tmp_path / "found")
        patch.setattr(harness, "GROWTH", 2**28)
        with pytest.MonkeyPatch.context() as briefly:
            briefly.setattr(harness, "HANG", 0.5)
            with pytest.raises(TimeoutError, match=r"longer than 0\.5 s"):
                fuzz(Target("endless", endless, edited([b"abcd"])), 5, 0, tmp_path)
        # Not so briefly: memory that is written to comes slowly where little is free.
        with pytest.raises(AssertionError, match=r"growing took .* bytes"):
            fuzz(Target("growing", growing, edited([b"abcd"])), 30, 0, tmp_path)
