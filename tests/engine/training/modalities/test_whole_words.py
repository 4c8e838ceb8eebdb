"""Masks of whole words: all tokens of a word or none, with the share that was asked for."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from selfdistill.data.errors import UserError
from selfdistill.data.formats.texts import Texts
from selfdistill.data.pack import pack
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.config.options import load
from selfdistill.engine.runtime.distributed import Ranks
from selfdistill.engine.training.modalities.tokens import Encoder
from selfdistill.engine.training.modalities.windows import _check_words
from selfdistill.engine.training.views import MaskTokens
from tests.kit import texts as text_kit

ASCII = " ".join(text_kit.SENTENCES).replace(",", "").split()
WORDS = [*ASCII, "unbelievably", "wörter", "日本"]
DRAWS, RATIO, MASK = 4000, 0.15, 4
#: How the first token of a word is told by its name.
FIRST = {
    "bpe": lambda token: token.startswith("Ġ"),
    "wordpiece": lambda token: not token.startswith("##"),
    "sentencepiece": lambda token: token.startswith("▁"),
}


def tokenizer_of(kind: str) -> Any:
    return text_kit.make_tokenizer() if kind == "bpe" else text_kit.make_other(kind)


def codec_of(tokenizer: Any, *, words: bool = True, **options: Any) -> Texts:
    return Texts(
        Encoder(tokenizer, 62, 2, words=words),
        pad_id=1,
        special_ids=frozenset(tokenizer.all_special_ids),
        max_length=62,
        bucket=8,
        **options,
    )


def batch_of(tokenizer: Any, lines: list[str], **options: Any) -> dict[str, torch.Tensor]:
    codec = codec_of(tokenizer, **options)
    return codec.collate([codec.decode(line.encode(), line) for line in lines], lines)


def some_lines(count: int, words: list[str] = WORDS) -> list[str]:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 12, count)
    return [" ".join(map(str, generator.choice(words, length))) for length in lengths]


def chosen_of(found: dict[str, np.ndarray], batch: dict[str, torch.Tensor]) -> np.ndarray:
    chosen = np.zeros(batch["input_ids"].numel(), bool)
    chosen[found["masked_at"]] = True
    return chosen.reshape(batch["input_ids"].shape)


@pytest.mark.parametrize("kind", FIRST)
def test_all_tokens_of_a_word_or_none(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    batch = batch_of(tokenizer, some_lines(DRAWS))
    found = MaskTokens(0, RATIO, "mask", MASK, 300)(np.arange(DRAWS), batch)
    chosen, maskable = chosen_of(found, batch), batch["maskable"].numpy()
    assert not (chosen & ~maskable).any()
    assert (found["masked_ids"][chosen] == MASK).all()
    assert (found["masked_ids"][~chosen] == batch["input_ids"].numpy()[~chosen]).all()
    sizes, hits = [], 0
    lengths = batch["attention_mask"].sum(1).tolist()
    for ids, row, length in zip(batch["input_ids"], chosen, lengths, strict=True):
        names = tokenizer.convert_ids_to_tokens(ids[:length])[1:-1]
        begins = [i for i, name in enumerate(names) if i == 0 or FIRST[kind](name)]
        for begin, end in itertools.pairwise([*begins, len(names)]):
            word = row[1 + begin : 1 + end]
            open_to = np.array([n != "<unk>" for n in names[begin:end]])
            assert word[open_to].all() or not word.any()
            if open_to.any():
                sizes.append(int(open_to.sum()))
                hits += int(word.any())
    assert max(sizes) > 3
    # Words are chosen independently: four standard deviations of their number, and of the tokens'.
    spread = RATIO * (1 - RATIO)
    assert abs(hits - RATIO * len(sizes)) < 4 * np.sqrt(spread * len(sizes))
    deviation = np.sqrt(spread * (np.array(sizes) ** 2).sum())
    assert abs(chosen.sum() - RATIO * maskable.sum()) < 4 * deviation


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_words_are_those_of_transformers(kind: str) -> None:
    """Its collator finds words by gaps between the tokens' offsets: not where one letter is two."""
    tokenizer = tokenizer_of(kind)
    lines = some_lines(50, [*ASCII, "unbelievably"])
    batch = batch_of(tokenizer, lines)
    collator = DataCollatorForLanguageModeling(
        tokenizer, whole_word_mask=True, mask_replace_prob=1, random_replace_prob=0
    )
    for line, words, maskable in zip(lines, batch["words"], batch["maskable"], strict=True):
        told = tokenizer(line, return_offsets_mapping=True, return_special_tokens_mask=True)
        theirs, _ = collator._calc_word_ids_and_prob_mask(
            np.array([told["offset_mapping"]]), np.array([told["special_tokens_mask"]])
        )
        ours = words[: len(told["input_ids"])].numpy()
        for a, b in itertools.product(np.flatnonzero(maskable), repeat=2):
            assert (ours[a] == ours[b]) == (theirs[0][a] == theirs[0][b])


def test_a_mask_depends_on_the_position_alone() -> None:
    tokenizer = tokenizer_of("bpe")
    lines = some_lines(20)
    mask = MaskTokens(3, 0.4, "bert", MASK, 300)
    together = batch_of(tokenizer, lines)
    found = mask(np.arange(100, 120), together)["masked_ids"]
    for row, line in enumerate(lines):
        alone = mask(np.array([100 + row]), batch_of(tokenizer, [line]))["masked_ids"][0]
        assert found[row, : len(alone)].tolist() == alone[: found.shape[1]].tolist()


def test_what_is_done_is_drawn_for_each_token() -> None:
    """Of the tokens that begin a word, and of the others: 8 of 10 masked, 1 random, 1 kept."""
    tokenizer = tokenizer_of("bpe")
    batch = batch_of(tokenizer, some_lines(DRAWS))
    found = MaskTokens(0, RATIO, "bert", MASK, 300)(np.arange(DRAWS), batch)
    chosen, ids = chosen_of(found, batch), batch["input_ids"].numpy()
    words = batch["words"].numpy()
    first = np.diff(words, axis=1, prepend=-2) != 0
    for part in (chosen & first, chosen & ~first):
        count = part.sum()
        for share, rate in (
            ((found["masked_ids"] == MASK) & part, 0.8),
            ((found["masked_ids"] == ids) & part, 0.1),
        ):
            # A random token may be the mask, or the token itself.
            assert abs(share.sum() - rate * count) < 4 * np.sqrt(rate * (1 - rate) * count) + 5


def test_pairs_and_windows_number_their_words() -> None:
    tokenizer = tokenizer_of("wordpiece")
    _, _, words = Encoder(tokenizer, 62, 2, words=True)("robust", "robust robust")
    runs = [list(run) for _, run in itertools.groupby(words)]
    assert len(runs) == len(set(words)) == 6  # <s>, a word, </s>, two words, </s>
    encoder = Encoder(tokenizer, 62, 2, words=True, overlap=3)
    ids, _, words = encoder.overlapping("robustrobust", "robustrobust")
    own = tokenizer("robustrobust", add_special_tokens=False)["input_ids"]
    assert len(own) > 3
    assert ids == [0, *own[-3:], *own, 2]
    assert len(set(words[1:4])) == len(set(words[4:-1])) == 1
    assert len(set(words)) == 4


def test_without_the_option_nothing_is_numbered() -> None:
    assert "words" not in batch_of(tokenizer_of("bpe"), ["a text"], words=False)


def test_a_tokenizer_that_does_not_tell_words_apart() -> None:
    raw = Tokenizer(models.BPE({"<s>": 0, "a": 1, " ": 2, "b": 3}, [], unk_token="<s>"))
    for special in (False, True):
        if special:  # which belong to no word
            raw.post_processor = processors.TemplateProcessing(
                single="<s> $A <s>", special_tokens=[("<s>", 0)]
            )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
        with pytest.raises(UserError, match=r"whole_word true: the tokenizer of x does not tell"):
            Encoder(tokenizer, 62, 1, words=True, origin="x")


def test_words_that_are_whole_texts_are_refused(tmp_path: Path) -> None:
    """As of XLM-R's tokenizer in Chinese: one word a text, and so all of it masked, or nothing."""
    for name, text in (("chinese", "患者出现发热咳嗽" * 3), ("english", "the patient has a fever")):
        lines = [json.dumps({"text": text, "label": str(i % 2)}) for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        pack(str(tmp_path / f"{name}.jsonl"), str(tmp_path / name), splits="1")
    letters = {c: i for i, c in enumerate(["?", "▁", *sorted(set("患者出现发热咳嗽thepainsfvr"))])}
    raw = Tokenizer(models.BPE(letters, [], unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    run = Run(load({}), Ranks(0, 0, 1, torch.device("cpu")), tmp_path)
    _check_words(run, Manifest.load(str(tmp_path / "english" / "train")), tokenizer)
    with pytest.raises(UserError, match="have 25 tokens on average"):
        _check_words(run, Manifest.load(str(tmp_path / "chinese" / "train")), tokenizer)
