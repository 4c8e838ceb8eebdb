"""Broken and hostile inputs: valid files with a few of their bytes, or of their JSON, changed."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

#: Stands for lists a hundred thousand deep, which json.dumps would not write.
DEEP = "deep, deep"
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 255, 1.5, -0.0, 1e-300, 1e30, float("inf")),
    *(float("nan"), 2**31, 2**53 - 1, 2**53, 2**63 - 1, 2**63, -(2**63), 10**30, 10**7, DEEP),
    *("", "x", "0", "2", "auto", "\0", "\ud800", "\u202e", "\x1b[2J", "a" * 300, "../x"),
    *("/etc/passwd", "pipe:touch canary", "PIPE://x", "http://[bad", "file:///etc/passwd", "²"),
    *([], [1], [[]], ["x"], [None], {}, {"a": 1}, {"": {}}, [0.5, 0.5, 0.5], "0" * 64, "a" * 64),
]
_BYTES = [
    *(b"", b"\0", b"\xff", b"\n", b",", b'"', b"{", b"[", b"\\u0000", b"\\ud800", b"NaN", b"-"),
    *(b"9" * 5000, b"[" * 3000, b"\xed\xa0\x80", b"%s", b"\x1b[31m", b"a" * 300, b"\xff" * 8),
    *(struct.pack("<q", n) for n in (-1, 0, 1, 2**31, 2**40, 2**63 - 1, -(2**63), -512, -1024)),
    *(struct.pack(">I", n) for n in (0, 1, 2**16, 2**31 - 1, 2**32 - 1, 13000)),
]
_EDITS = st.lists(
    st.tuples(
        st.sampled_from(("set", "insert", "cut", "double", "end", "move")),
        st.integers(0, 2**16 - 1),
        st.integers(0, 2**16 - 1),
        st.one_of(st.sampled_from(_BYTES), st.binary(min_size=1, max_size=8)),
    ),
    min_size=1,
    max_size=4,
)


def _edited(content: bytes, edits: Sequence[tuple[str, int, int, bytes]]) -> bytes:
    for kind, where, other, given in edits:
        at, to = where * len(content) // 2**16, other * len(content) // 2**16
        low, high = sorted((at, to))
        content = {
            "set": content[:at] + given + content[at + len(given) :],
            "insert": content[:at] + given + content[at:],
            "cut": content[:low] + content[high:],
            "double": content[:high] + content[low:],
            "end": content[:at],
            "move": content[:low] + content[high:] + content[low:high],
        }[kind]
    return content


def edited(seeds: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Whole files with up to four edits, most near the beginning where the headers are."""
    return st.builds(_edited, st.sampled_from(list(seeds)), _EDITS)


def _dumped(value: Any) -> bytes:
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        text = "null"
    return text.replace(json.dumps(DEEP), "[" * 10**5 + "]" * 10**5).encode("utf-8", "replace")


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every container with every key in it."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(entries):
        found.append((value, key))
        if isinstance(inner, (dict, list)):
            _places(inner, found)
    return found


def _changed(seed: str, edits: Sequence[tuple[str, int, Any]]) -> Any:
    value = json.loads(seed)
    for kind, where, kept in edits:
        given = copy.deepcopy(kept)
        places = _places(value, [])
        if not places:
            return given
        container, key = places[where % len(places)]
        if kind == "root":
            return given
        if kind == "drop":
            del container[key]
        elif kind == "add" and isinstance(container, dict):
            container[f"x{where}"] = given
        elif kind == "add":
            container.append(given)
        elif kind == "wrap":
            container[key] = [container[key]]
        else:
            container[key] = given
    return value


def changed(seeds: Sequence[Any]) -> st.SearchStrategy[Any]:
    """JSON documents with up to three entries changed, as values."""
    texts = [json.dumps(seed) for seed in seeds]
    kinds = st.sampled_from(("set", "set", "set", "drop", "add", "wrap", "root"))
    edits = st.lists(
        st.tuples(kinds, st.integers(0, 2**16), st.sampled_from(VALUES)), min_size=1, max_size=3
    )
    return st.builds(_changed, st.sampled_from(texts), edits)


def documents(seeds: Sequence[Any]) -> st.SearchStrategy[bytes]:
    """JSON documents with entries changed, now and then with bytes changed after that."""
    whole = changed(seeds).map(_dumped)
    return st.one_of(whole, whole, whole, edited([_dumped(seed) for seed in seeds]))
