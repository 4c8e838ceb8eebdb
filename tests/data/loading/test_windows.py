"""Windows of long texts: where they are cut, how samples number them, what loaders read of them."""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfdistill.data.formats.sentences import cut, divide
from selfdistill.data.formats.texts import Texts
from selfdistill.data.loading import windows as windows_module
from selfdistill.data.loading.loader import Loader, Sequential
from selfdistill.data.loading.windows import Windows, by_bytes, fitting, parts_of, table_of
from selfdistill.data.packing.encoding import TextModality
from selfdistill.data.packing.writer import write_split
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.sources.samples import Sample

BOS, PAD, EOS, ROOM = 0, 1, 2, 12


def words(text: str) -> list[int]:
    """A tokenizer of another make: each word, and each other sign, is a token; where they begin."""
    return [match.start() for match in re.finditer(r"\w+|[^\w\s]", text)]


def encode(text: str, pair: str | None = None) -> list[int]:
    tokens = [10 + int(word) for word in re.findall(r"\d+", text)]
    return [BOS, *tokens, EOS]


def number_text(first: int, sentences: Sequence[int]) -> str:
    """Sentences of so many numbers, which go on from `first` through the text."""
    count = itertools.count(first)
    return " ".join(" ".join(f"{next(count)}" for _ in range(n)) + "." for n in sentences)


def pieces(text: str, places: list[int]) -> list[str]:
    return [text[a:b] for a, b in zip(places, [*places[1:], None], strict=True)]


texts = st.lists(
    st.sampled_from(["word ", "Ein Satz. ", '"Ja!" ', "今日は。", "そう！？", "\n", "  ", "x" * 30])
    | st.characters(exclude_categories=["Cs"]),
    max_size=60,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(texts, st.integers(1, 20))
def test_windows_fit_and_make_the_text(text: str, room: int) -> None:
    places, over = fitting(text, words, room)
    found = pieces(text, places)
    assert places[0] == 0
    assert "".join(found) == text
    assert over == 0
    assert all(len(words(piece)) <= room for piece in found)
    assert len(places) == len(set(places)) == 1 or all(found)


@settings(max_examples=300, deadline=None)
@given(texts, st.integers(1, 20))
def test_parts_of_equal_length_make_the_text(text: str, parts: int) -> None:
    parts = min(parts, max(1, len(text)))
    places = [cut(text, number, parts) for number in range(parts + 1)]
    assert (places[0], places[-1]) == (0, len(text))
    assert places == sorted(places)
    assert all(
        abs(place - number * len(text) / parts) <= 1 + len(text) / (20 * parts)
        for number, place in enumerate(places)
    )


@pytest.mark.parametrize(
    ("text", "room", "found"),
    [
        ("One two three. Four five. Six.", 5, ["One two three.", " Four five. Six."]),
        # As few as hold it, and these as equal as can be: not 2 + 2 + 1 sentences.
        ("A b c. " * 5, 12, ["A b c. A b c. A b c.", " A b c. A b c. "]),
        ('"Stop!" (He did.) Then 3.5 went', 6, ['"Stop!"', " (He did.)", " Then 3.5 went"]),
        ("今日は。「はい！？」では", 5, ["今日は。", "「はい！？」", "では"]),
        ("no marks at all\nbut two lines", 4, ["no marks at all", "\nbut two lines"]),
        # A sentence that is longer than a window: between words, and the rest goes on from there.
        ("a b c d e. F.", 3, ["a b c", " d e.", " F."]),
        ("यह पहला है। यह दूसरा है।", 12, ["यह पहला है।", " यह दूसरा है।"]),
        ("x", 1, ["x"]),
        ("", 1, [""]),
    ],
)
def test_where_texts_are_cut(text: str, room: int, found: list[str]) -> None:
    assert pieces(text, fitting(text, words, room)[0]) == found


def test_a_word_longer_than_a_window_is_cut_anywhere() -> None:
    emoji = "👩‍👩‍👧" * 9
    starts = [i for i in range(len(emoji)) for _ in range(4)]  # bytes as tokens
    places = divide(emoji, starts, 20)
    assert "".join(pieces(emoji, places)) == emoji
    assert {len(piece) for piece in pieces(emoji, places)} == {5}
    # One character that has more tokens than a window: each is a window, what is too much is told.
    places, over = fitting("ab", lambda text: [i for i in range(len(text)) for _ in "1234"], 3)
    assert (places, over) == ([0, 1], 2)


def test_a_tokenizer_that_begins_each_text_with_a_token_of_its_own() -> None:
    text = number_text(0, [5] * 20)
    places, over = fitting(text, lambda piece: [0, *words(piece)], ROOM)
    assert over == 0
    assert all(1 + len(words(piece)) <= ROOM for piece in pieces(text, places))


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Eleven texts in shards of three; text t has the numbers from 1000 t on."""
    root = tmp_path_factory.mktemp("windows")
    lengths = [[3], [5] * 9, [4], [11, 30, 2], [1], [5] * 40, [7, 7], [2], [1], [9], [8] * 3]
    lines = [number_text(1000 * number, found) for number, found in enumerate(lengths)]
    samples = (Sample(f"k{i}", line.encode(), None) for i, line in enumerate(lines))
    write_split(samples, [], root, split="train", kind=TextModality(), samples_per_shard=3)
    return Manifest.load_split(str(root), "train")


def lines_of(manifest: Manifest) -> list[str]:
    from selfdistill.data.loading.reader import Reader

    return [r.input.decode() for r in Reader(manifest).read(np.arange(manifest.samples))]


def exact(manifest: Manifest) -> Windows:
    found = [fitting(line, words, ROOM)[0] for line in lines_of(manifest)]
    long = [number for number, places in enumerate(found) if len(places) > 1]
    parts = np.array([len(found[number]) for number in long])
    places = [place for number in long for place in found[number]]
    return Windows(table_of(np.array(long), parts, places), len(long), manifest)


def codec(**options: Any) -> Texts:
    table = {"pad_id": PAD, "special_ids": frozenset({BOS, EOS}), "max_length": 600, "bucket": 4}
    return Texts(encode, **(table | options))


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=11, max_size=11))
def test_samples_number_all_windows(split: Manifest, parts: list[int]) -> None:
    wanted = [(text, part, n) for text, n in enumerate(parts) for part in range(n)]
    long = np.array([text for text, n in enumerate(parts) if n > 1], np.int64)
    windows = Windows(table_of(long, np.array(parts)[long]), len(long), split)
    assert windows.samples == len(wanted)
    assert [windows.window(i)[:3] for i in range(len(wanted))] == wanted
    assert windows.counts.tolist() == [sum(parts[i : i + 3]) for i in range(0, 11, 3)]


def test_a_table_of_another_split_is_no_table(split: Manifest) -> None:
    good = table_of(np.array([2, 5]), np.array([2, 3]), [0, 5, 0, 6, 9])
    Windows(good, 2, split)
    for at, value in ((1, 11), (0, 5), (2, 1), (3, 7), (4, 1), (6, -1)):
        broken = good.copy()
        broken[at] = value
        with pytest.raises(ValueError, match="does not number"):
            Windows(broken, 2, split)


@pytest.mark.parametrize("by", ["tokens", "bytes"])
def test_a_pass_reads_every_token_once(split: Manifest, by: str) -> None:
    windows = exact(split) if by == "tokens" else Windows(*by_bytes(split, 120.0), split)
    assert windows.long == (5 if by == "tokens" else 4)
    passed = Sequential(split, batch=4, codec=codec(), windows=windows)
    rows = [
        ids[ids >= 10].tolist()
        for batch in passed
        for ids, valid in zip(batch["input_ids"], batch["valid"], strict=True)
        if valid
    ]
    assert len(rows) == windows.samples
    read = list(itertools.chain(*rows))
    assert read == [n + 10 for line in lines_of(split) for n in map(int, re.findall(r"\d+", line))]
    if by == "tokens":
        assert max(map(len, rows)) <= ROOM


def test_windows_that_overlap(split: Manifest) -> None:
    """Each begins with the last tokens of the one before, in its text alone."""

    def overlapping(before: str, text: str) -> list[int]:
        return [BOS, *encode(before)[1:-1][-3:], *encode(text)[1:]]

    windows = exact(split)
    passed = Sequential(split, batch=50, codec=codec(overlapping=overlapping), windows=windows)
    (batch,) = passed
    plain = next(iter(Sequential(split, batch=50, codec=codec(), windows=windows)))
    for sample in range(windows.samples):
        ids, own = (b["input_ids"][sample] for b in (batch, plain))
        ids, own = ids[ids >= 10].tolist(), own[own >= 10].tolist()
        if windows.window(sample).part:
            before = plain["input_ids"][sample - 1]
            assert ids == before[before >= 10].tolist()[-3:] + own
        else:
            assert ids == own


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_workers_and_resume_see_the_same_windows(split: Manifest, workers: int) -> None:
    windows = exact(split)

    def stream(steps: int, **options: Any) -> list[list[int]]:
        options = {"seed": 3, "codec": codec(), "windows": windows} | options
        loader = iter(Loader(split, batch=8, **options))
        found = [next(loader) for _ in range(steps)]
        loader.close()
        return [row[row >= 10].tolist() for batch in found for row in batch["input_ids"]]

    whole = stream(12)
    epochs = [sorted(whole[i : i + windows.samples]) for i in (0, windows.samples)]
    assert epochs[0] == epochs[1]  # each window once
    assert stream(7, start_step=5, workers=workers) == whole[40:]
    ranks = [stream(12, rank=rank, world=2, workers=workers) for rank in range(2)]
    parts = [r[i : i + 4] for i in range(0, 48, 4) for r in ranks]
    assert list(itertools.chain(*parts)) == whole


def test_without_long_texts_the_stream_is_as_it_was(split: Manifest) -> None:
    none = Windows(table_of(np.zeros(0, np.int64), np.zeros(0, np.int64)), 0, split)
    streams = [
        iter(Loader(split, batch=5, codec=codec(), **options))
        for options in ({}, {"windows": none})
    ]
    for _ in range(6):
        one, other = (next(stream) for stream in streams)
        assert all(one[key].equal(other[key]) for key in ("input_ids", "ids", "positions"))


def test_a_large_split_is_looked_at_in_pieces(
    split: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, long = by_bytes(split, 50.0)
    monkeypatch.setattr(windows_module, "_ROWS", 4)
    again, found = by_bytes(split, 50.0)
    assert (again.tolist(), found) == (whole.tolist(), long)
    sizes = [len(line) for line in lines_of(split)]
    assert Windows(again, long, split).samples == sum(parts_of(np.array(sizes), 50.0))
