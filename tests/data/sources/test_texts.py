"""Texts in shards: what is stored is read back, and becomes batches of token ids."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RobertaConfig, RobertaModel

from selfdistill.data.errors import BrokenData, UserError
from selfdistill.data.formats import texts
from selfdistill.data.formats.texts import Text, Texts, pack_rows, parse
from selfdistill.data.loading.codec import Codec
from selfdistill.data.loading.loader import Loader, Sequential
from selfdistill.data.packing.encoding import TextModality
from selfdistill.data.packing.writer import write_split
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.sources.samples import Sample

BOS, PAD, EOS = 0, 1, 2
SPECIAL = frozenset({BOS, PAD, EOS})
MAX = 40


def encode(text: str, pair: str | None) -> list[int]:
    """A word is its length + 10; truncated as a tokenizer would."""
    ids = [BOS, *(10 + len(word) for word in text.split())]
    if pair is not None:
        ids += [EOS, *(10 + len(word) for word in pair.split())]
    return [*ids[: MAX - 1], EOS]


def codec(**options: object) -> Texts:
    table = {"pad_id": PAD, "special_ids": SPECIAL, "max_length": MAX, "bucket": 16} | options
    return Texts(encode, **table)


def shards(root: Path, *lines: str, stored: str = "txt") -> Manifest:
    """A split of these texts (JSON for pairs) in this order, text i with label i % 2."""
    samples = [Sample(f"k{i}", line.encode(), i % 2) for i, line in enumerate(lines)]

    def streamed() -> Iterator[Sample]:
        yield from samples

    kind = TextModality(stored, "macro_f1")
    write_split(streamed(), ["a", "b"], root, kind=kind, samples_per_shard=3)
    return Manifest.load_split(str(root), "train")


words = st.text(min_size=1).filter(str.strip)


@settings(deadline=None)
@given(words, st.none() | words)
def test_what_is_stored_is_read_back(text: str, pair: str | None) -> None:
    content = texts.store(text, pair, "json")
    assert parse(content, "x", "json") == Text(text, pair)
    assert json.loads(content).get("text_pair") == pair
    if pair is None:
        assert texts.store(text, None, "txt") == text.encode()
        assert parse(text.encode(), "x") == Text(text, None)


@pytest.mark.parametrize(
    ("content", "stored", "said"),
    [
        (b"caf\xe9", "txt", "is not UTF-8 (byte 3)"),
        (b"", "txt", "it is empty"),
        (b" \n\t", "txt", "it is empty"),
        (b"{", "json", "no valid JSON"),
        (b"[" * 100_000, "json", "no valid JSON"),
        (b"[1]", "json", 'no JSON object with a string "text"'),
        (b'{"txt": "a"}', "json", 'no JSON object with a string "text"'),
        (b'{"text": 3}', "json", 'no JSON object with a string "text"'),
        (b'{"text": "a", "text_pair": 3}', "json", '"text_pair" is no string'),
        (b'{"text": "a", "text_pair": " "}', "json", "second of its pair is empty"),
        (b'{"text": "\xff"}', "json", "is not UTF-8"),
    ],
)
def test_broken_members_are_named(content: bytes, stored: texts.Stored, said: str) -> None:
    with pytest.raises(BrokenData, match=r"shard s\.tar, k: the text cannot be read") as caught:
        parse(content, "shard s.tar, k", stored)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_a_surrogate_pair_cannot_be_stored() -> None:
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        texts.store("\ud800", None, "txt")


def test_a_batch_is_padded_to_a_bucket() -> None:
    names = ["a", "bb cc", "d " * 17]
    it: Codec = codec()
    arrays = [it.decode(name.encode(), name) for name in names]
    batch = it.collate(arrays, names)
    assert batch["input_ids"].shape == (3, 32)  # 19 tokens, a bucket is 16
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert batch["input_ids"][1].tolist() == [BOS, 12, 12, EOS] + [PAD] * 28
    assert batch["attention_mask"].sum(1).tolist() == [3, 4, 19]
    assert batch["maskable"].dtype == torch.bool
    assert batch["maskable"][1].nonzero().flatten().tolist() == [1, 2]
    assert it.collate(arrays[:2], names)["input_ids"].shape == (2, 16)


def test_no_batch_is_longer_than_the_maximum() -> None:
    it = codec()
    document = it.decode(("word " * 100_000).encode(), "long")
    assert len(document) == MAX
    assert it.collate([document], ["long"])["input_ids"].shape == (1, MAX)  # 40, and not 48


def test_pairs() -> None:
    it = codec(pairs=True)
    ids = it.decode(b'{"text": "a bb", "text_pair": "ccc"}', "p")
    assert ids.tolist() == [BOS, 11, 12, EOS, 13, EOS]
    assert it.collate([ids], ["p"])["maskable"].sum() == 3
    with pytest.raises(BrokenData, match="no valid JSON"):
        it.decode(b"a single text", "p")


def test_a_text_of_special_tokens_has_nothing_to_mask() -> None:
    batch = codec(special_ids=frozenset({BOS, EOS, 11})).collate([np.array([BOS, 11, EOS])], ["x"])
    assert not batch["maskable"].any()
    assert batch["attention_mask"].sum() == 3


def test_a_model_gives_numbers_for_padding_rows() -> None:
    it = codec()
    blank = it.blank(None)
    assert blank is not None
    batch = it.collate([it.decode(b"one two", "x"), blank], ["x", "padding"])
    assert batch["attention_mask"][1].tolist() == [1] + [0] * 15
    assert not batch["maskable"][1].any()
    config = RobertaConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    for attention in ("sdpa", "eager"):
        torch.manual_seed(0)
        model = RobertaModel._from_config(config, attn_implementation=attention).eval()
        both = model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        assert both.isfinite().all()
        alone = model(torch.tensor([[BOS, 13, 13, EOS]])).last_hidden_state
        torch.testing.assert_close(both[:1, :4], alone, rtol=1e-4, atol=1e-5)


def test_shards_of_texts(tmp_path: Path) -> None:
    lines = ["one", "zwei Wörter", "a\nb", "five  spaces ", "é" * 300]
    manifest = shards(tmp_path / "s", *lines)
    assert (manifest.kind, manifest.image) == ("text", {})
    assert manifest.text == {"pairs": False, "stored": "txt", "metric": "macro_f1"}
    assert manifest.class_counts == [3, 2]
    tars = sorted(map(str, (tmp_path / "s" / "train").glob("*.tar")))
    reader = webdataset.WebDataset(tars, shardshuffle=False).decode().to_tuple("txt", "cls")
    assert list(reader) == [(line, i % 2) for i, line in enumerate(lines)]
    batches = list(Sequential(manifest, batch=4, codec=codec()))
    assert [b["labels"].tolist() for b in batches] == [[0, 1, 0, 1], [0, -1, -1, -1]]
    assert batches[0]["input_ids"][1, :4].tolist() == [BOS, 14, 16, EOS]
    assert batches[1]["attention_mask"].sum(1).tolist() == [3, 1, 1, 1]
    assert batches[1]["valid"].tolist() == [True, False, False, False]


def test_the_stream_gives_every_rank_its_texts(tmp_path: Path) -> None:
    manifest = shards(tmp_path / "s", *("w " * (n + 1) for n in range(7)))
    whole = iter(Loader(manifest, batch=4, codec=codec()))
    parts = [iter(Loader(manifest, batch=4, rank=r, world=2, codec=codec())) for r in range(2)]
    for _ in range(4):
        expected = next(whole)["attention_mask"].sum(1).tolist()
        found = [n for part in parts for n in next(part)["attention_mask"].sum(1).tolist()]
        assert found == expected


def test_broken_texts_are_skipped_when_asked(tmp_path: Path) -> None:
    manifest = shards(tmp_path / "s", "aaaa", "bbbb", "cccc", "dddd")
    tar = next((tmp_path / "s" / "train").glob("*000000.tar"))
    content = bytearray(tar.read_bytes())
    content[int(manifest.members[1, 0])] = 0xFF
    tar.write_bytes(content)
    with pytest.raises(UserError, match=r"k1.txt: the text cannot be read: it is not UTF-8"):
        list(Sequential(manifest, batch=4, codec=codec()))
    with pytest.warns(UserWarning, match="skipped: .*k1.txt"):
        (batch,) = Sequential(manifest, batch=4, codec=codec(), skip_broken=0.5)
    assert batch["valid"].tolist() == [True, False, True, True]


def test_texts_need_a_codec(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds text"):
        Sequential(shards(tmp_path / "s", "a"), batch=1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=12))
def test_packed_rows_hold_each_token_once(lengths: list[int]) -> None:
    width = 20
    at, to = pack_rows(lengths, width)
    places = [i * width + t for i, length in enumerate(lengths) for t in range(length)]
    assert sorted(at[at >= 0].tolist()) == places
    assert all(at.flatten()[to.flatten()[place]] == place for place in places)
    assert sum(lengths) / width <= len(at) <= len(lengths)


def test_a_batch_says_how_its_texts_share_rows() -> None:
    codec = Texts(encode, pad_id=PAD, special_ids=SPECIAL, max_length=8, bucket=4, packed=True)
    batch = codec.collate([np.zeros(n, np.int64) for n in (8, 3, 4, 1)], list("abcd"))
    assert batch["packed_at"].tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [16, 17, 18, 19, 8, 9, 10, 24],
    ]
    assert batch["packed_to"][3].tolist() == [15, 0, 0, 0, 0, 0, 0, 0]
    # Where no row is spared, none is shared; where nothing is padded, it is said.
    assert "packed_at" not in codec.collate([np.zeros(n, np.int64) for n in (8, 7)], ["a", "b"])
    whole = codec.collate([np.zeros(8, np.int64)] * 2, ["a", "b"])
    assert whole["unpadded"].tolist() == [True, True]
