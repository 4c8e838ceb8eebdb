"""A language model from scratch, and the tokenizer that it needs."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, RobertaTokenizer

from selfdistill.data import pack
from selfdistill.data.tokenizer import SPECIAL, tokenizer
from selfdistill.engine.models.texts.fresh import OFFSETS, fresh_roberta, small_config
from tests.kit import texts as text_kit
from tests.kit.command import call


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    (root / "all.txt").write_text("\n".join([*text_kit.SENTENCES * 3, "naïve 😀 \u2028 text"]))
    pack.pack(str(root / "all.txt"), str(root / "shards"), split="train")
    return root / "shards"


def test_tokenizer_reads_back_what_it_is_given(shards: Path, tmp_path: Path) -> None:
    assert call(tokenizer, shards, tmp_path / "t", "--entries", 300, "--max_length", 40) == 0
    found = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert len(found) == 300
    assert found.convert_ids_to_tokens(list(range(5))) == list(SPECIAL)
    assert (found.model_max_length, found.mask_token_id, found.pad_token_id) == (40, 4, 1)
    for text in (*text_kit.SENTENCES, "naïve 😀 \u2028 text", "new ünicode\t 語"):
        ids = found(text)["input_ids"]
        assert (ids[0], ids[-1]) == (0, 2)
        assert found.decode(ids[1:-1], clean_up_tokenization_spaces=False) == text
    # A typed mask stands for the word and the space before it.
    assert found("the <mask>")["input_ids"] == [*found("the")["input_ids"][:-1], 4, 2]
    pair = found("the cell", "the parser")["input_ids"]
    assert pair.count(2) == 3  # <s> a </s></s> b </s>


def test_tokenizer_has_the_merges_of_the_most_frequent_pairs(tmp_path: Path) -> None:
    """On a text of one word, the merges are forced: an oracle without a library."""
    (tmp_path / "one.txt").write_text("\n".join(["ababab"] * 9))
    pack.pack(str(tmp_path / "one.txt"), str(tmp_path / "s"), split="train")
    assert call(tokenizer, tmp_path / "s", tmp_path / "t", "--entries", 263) == 0
    found = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert found.tokenize("ababab") == ["abab", "ab"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--entries", "100"], "bytes and special tokens alone are 261"),
        (["--max_length", "2"], "give 3 or more"),
        (["--split", "tset"], "Did you mean test"),
    ],
)
def test_mistakes(
    words: list[str], said: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tokenizer, shards, tmp_path / "t", *words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_nothing_is_overwritten(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tokenizer, shards, shards.parent) == 2
    assert "exists: give another folder" in capsys.readouterr().err


def test_the_first_layer_looks_at_neighbours_and_the_loss_is_that_of_frequencies() -> None:
    size = 400
    torch.manual_seed(0)
    config = small_config(list_tokenizer(size), width=192, depth=2, heads=6, max_length=64)
    generator = np.random.default_rng(0)
    counts = np.r_[np.zeros(5), 1e6 / np.arange(1, size - 4)].astype(np.int64)
    model = fresh_roberta(config, mask_id=4, counts=counts).eval()
    shares = (counts + 0.5) / (counts + 0.5).sum()
    ids = torch.from_numpy(generator.choice(size, size=(16, 60), p=shares))
    masked = ids.masked_fill(torch.rand(ids.shape) < 0.15, 4)

    seen = {}
    first = model.roberta.encoder.layer[0].attention.self
    first.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    with torch.no_grad():
        logits = model(masked).logits
        x = seen["x"]
        query, key = (
            layer(x).view(16, 60, 6, 32).transpose(1, 2) for layer in (first.query, first.key)
        )
        weights = (query @ key.transpose(2, 3) / math.sqrt(32)).softmax(-1)
    for head, offset in enumerate(OFFSETS[:5]):
        share = weights[:, head].diagonal(offset, 1, 2)[:, 4:-4].mean()
        assert share > 0.4, (head, float(share))
    chosen = masked == 4
    loss = torch.nn.functional.cross_entropy(logits[chosen], ids[chosen])
    by_frequency = -np.log(shares[ids[chosen].numpy()]).mean()
    assert abs(float(loss) - by_frequency) < 0.1
    # Hidden states at masked places differ, or there is nothing to learn from.
    hidden = model.roberta(masked).last_hidden_state[chosen]
    assert float(hidden.std(0).mean()) > 0.5


def list_tokenizer(size: int) -> RobertaTokenizer:
    """A tokenizer of so many entries: its special ids are all that matters here."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL)}
    vocabulary |= {f"w{i}": i for i in range(len(SPECIAL), size)}
    return RobertaTokenizer(vocab=vocabulary, merges=[])
