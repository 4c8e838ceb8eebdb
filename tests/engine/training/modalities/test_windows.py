"""Windows of long texts in the engine: real tokenizers, the count in the run's folder, runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CanineTokenizer

from selfdistill.data.errors import UserError
from selfdistill.data.formats.texts import Texts, store
from selfdistill.data.loading import windows as counting
from selfdistill.data.loading.loader import Sequential
from selfdistill.data.loading.windows import Windows
from selfdistill.data.packing.encoding import TextModality as Packed
from selfdistill.data.packing.writer import write_split
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.sources.samples import Sample
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.config.schema import Config
from selfdistill.engine.config.sections import TextSection
from selfdistill.engine.models.texts.weights import load_language
from selfdistill.engine.runtime.distributed import Ranks
from selfdistill.engine.training.modalities.text import TextModality
from selfdistill.engine.training.modalities.tokens import Encoder
from selfdistill.engine.training.modalities.windows import windows_of
from tests.kit import texts as text_kit
from tests.kit.launches import metrics, run_cases

WORDS = " ".join(text_kit.SENTENCES).split()
LONG_WORD = 6  # in TEXTS
CHINESE = "今天天气很好。我们去公园散步吧！你觉得怎么样？"


def document(number: int, words: int) -> str:
    """Sentences of 4 to 14 words."""
    generator = np.random.default_rng(number)
    found: list[str] = []
    while words > 0:
        length = int(generator.integers(4, 15))
        found.append(" ".join(map(str, generator.choice(WORDS, length))).capitalize() + ".")
        words -= length
    return "\n".join([" ".join(found[: len(found) // 2]), " ".join(found[len(found) // 2 :])])


TEXTS = [
    document(0, 500),
    "word",
    document(1, 10),
    CHINESE * 30,
    "so happy 👩‍👩‍👧 👍🏽 🎉! " * 40,
    " ".join(WORDS * 20),  # a sentence that is far longer than a window
    "x" * 900,
    "  spaces   and\n\n\nlines\t\t. Then more.  " * 30,
    document(2, 300),
]


def write(root: Path, texts: list[str], split: str = "train", *, pairs: bool = False) -> Manifest:
    kind = Packed("json") if pairs else Packed()
    label = {"label": 0} if split == "val" else {"label": None}
    contents = [store(text, text, "json") if pairs else text.encode() for text in texts]
    samples = (Sample(f"k{i}", content, **label) for i, content in enumerate(contents))
    write_split(samples, [], root, split=split, kind=kind, samples_per_shard=4)
    return Manifest.load_split(str(root), split)


pytestmark = pytest.mark.usefixtures("ranks")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write(tmp_path_factory.mktemp("long"), TEXTS)


@pytest.fixture(scope="module", params=["bpe", "wordpiece", "sentencepiece"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with each kind of tokenizer."""
    kind = request.param
    tokenizer = text_kit.make_tokenizer() if kind == "bpe" else text_kit.make_other(kind)
    folder = text_kit.make_language(tmp_path_factory.mktemp(kind) / "base", tokenizer=tokenizer)
    return load_language(str(folder))


def text_modality(folder: Path, manifest: Manifest, **options: object) -> TextModality:
    config = Config()
    for name, value in options.items():
        setattr(config.text, name, value)
    return TextModality(Run(config, Ranks(0, 0, 1, torch.device("cpu")), folder), manifest)


def windows_read(kind: TextModality, base: Any, split: Manifest) -> list[tuple[int, list[int]]]:
    """Text and token ids, without special ones, of every sample that a loader reads."""
    windows = kind.windows(split, base)
    assert isinstance(windows, Windows)
    special = base.tokenizer.all_special_ids
    assert base.tokenizer.unk_token_id in special
    special = [i for i in special if i != base.tokenizer.unk_token_id]
    found = []
    for batch in Sequential(split, batch=7, codec=kind.codec(base, split), windows=windows):
        assert batch["input_ids"].shape[1] <= base.max_length
        rows = zip(batch["ids"], batch["input_ids"], batch["valid"], strict=True)
        for sample, ids, valid in rows:
            if valid:
                text = windows.window(int(sample)).text
                found.append((text, [i for i in ids.tolist() if i not in special]))
    return found


def whole(base: Any, text: str) -> list[int]:
    ids: list[int] = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_all_windows_of_a_text_are_its_tokens(tmp_path: Path, split: Manifest, base: Any) -> None:
    read = windows_read(text_modality(tmp_path, split), base, split)
    for number, text in enumerate(TEXTS):
        ids = [i for at, part in read if at == number for i in part]
        wanted = whole(base, text)
        if number == LONG_WORD:  # its pieces may be tokens of their own: of letters none is lost
            ids, wanted = (base.tokenizer.decode(i).count("x") for i in (ids, wanted))
        assert ids == wanted, text[:40]


def test_windows_share_so_many_tokens(tmp_path: Path, split: Manifest, base: Any) -> None:
    read = windows_read(text_modality(tmp_path, split, overlap=5), base, split)
    for number in (0, 1, 2, 7, 8):
        before: list[int] = []
        ids: list[int] = []
        for _, part in (entry for entry in read if entry[0] == number):
            shared = before[-5:]
            assert part[: len(shared)] == shared
            before = part[len(shared) :]
            ids += before
        assert ids == whole(base, TEXTS[number])


def test_the_count_is_kept(
    tmp_path: Path, split: Manifest, base: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first = text_modality(tmp_path, split).windows(split, base)
    assert first is not None
    said = capsys.readouterr().out
    assert f"9 texts, {first.long} of them long, make {first.samples} windows of at most" in said
    assert said.endswith("tokens left out: 0\n")
    files = sorted((tmp_path / "windows").iterdir())
    times = [file.stat().st_mtime_ns for file in files]
    again = text_modality(tmp_path, split).windows(split, base)
    assert again is not None
    assert again.counts.tolist() == first.counts.tolist()
    assert [file.stat().st_mtime_ns for file in files] == times
    # Another length is another count.
    text_modality(tmp_path, split, overlap=4).windows(split, base)
    assert len(list((tmp_path / "windows").iterdir())) == 4
    table = np.load(files[1])
    table[0] = 10**9
    np.save(files[1], table)
    with pytest.raises(UserError, match=r"of another split .* delete .*windows to count"):
        text_modality(tmp_path, split).windows(split, base)
    files[1].unlink()
    with pytest.raises(UserError, match="is missing"):
        text_modality(tmp_path, split).windows(split, base)
    with pytest.raises(UserError, match=r"--text.overlap 40: windows have .* give at most 30"):
        text_modality(tmp_path, split, overlap=40).windows(split, base)


def test_a_large_set_is_counted_by_bytes(
    tmp_path: Path,
    split: Manifest,
    base: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What it says of tokens that are left out, of a sample that is the whole set, is so."""
    monkeypatch.setattr(counting, "EXACT", 0)
    monkeypatch.setattr(counting, "_DENSE", 0.5)  # so that some are left out
    kind = text_modality(tmp_path, split)
    read = windows_read(kind, base, split)
    said = capsys.readouterr().out
    total = sum(len(whole(base, text)) for text in TEXTS)
    lost = total - sum(len(ids) for _, ids in read)
    assert lost > 0
    share = float(said.split("tokens left out: about ")[1].split("%")[0])
    assert share == pytest.approx(100 * lost / total, abs=1)  # Metaspace makes more of parts
    assert "(looked at 9 texts)" in said


def test_what_is_not_cut_into_windows(
    tmp_path: Path, split: Manifest, base: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    short = write(tmp_path / "short", ["one text", "and another one"])
    assert text_modality(tmp_path, short).windows(short, base) is None
    assert capsys.readouterr().out == ""
    kind = text_modality(tmp_path, split, split=False)
    assert kind.windows(split, base) is None
    kind.check(split, base)
    long = sum(len(whole(base, text)) + 2 > base.max_length for text in TEXTS)
    assert f"of 9 texts {long} are longer than 62 tokens: only their" in capsys.readouterr().out
    pairs = write(tmp_path / "pairs", TEXTS, pairs=True)
    kind = text_modality(tmp_path, pairs)
    assert kind.windows(pairs, base) is None
    kind.check(pairs, base)
    assert "only their beginnings are read" in capsys.readouterr().out


def test_a_slow_tokenizer_counts_by_bytes(
    tmp_path: Path, split: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    """It does not tell where its tokens lie in a text. Its tokens are characters."""
    tokenizer = CanineTokenizer()
    run = text_modality(tmp_path, split).run
    windows = windows_of(run, split, tokenizer, 62, 2)
    assert windows is not None
    said = capsys.readouterr().out
    encoder = Encoder(tokenizer, 62, 0)
    codec = Texts(encoder, pad_id=0, special_ids=frozenset(), max_length=62)
    passed = Sequential(split, batch=5, codec=codec, windows=windows)
    read = "".join(
        chr(i)
        for batch in passed
        for ids in batch["input_ids"]
        for i in ids.tolist()
        if 0 < i not in tokenizer.all_special_ids
    )
    total = len("".join(TEXTS))
    lost = float(said.split("tokens left out: about ")[1].split("%")[0])
    assert lost == pytest.approx(100 * (total - len(read)) / total, abs=0.01)
    assert lost < 2


def test_an_overlap_without_windows_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="overlap is that of windows"):
        TextSection(split=False, overlap=3)


@pytest.mark.multi
def test_runs_on_long_texts(tmp_path: Path) -> None:
    """One or two ranks: the same samples and losses; interrupted twice: the same bits."""
    long = [document(number, 30 + 40 * (number % 4)) for number in range(10)]
    write(tmp_path / "shards", [*long[:4], "short", "as short", *long[4:], "the last"])
    text_kit.make_language(tmp_path / "base")

    def case(name: str, **more: object) -> dict[str, object]:
        return {
            "data": str(tmp_path / "shards"),
            "model": str(tmp_path / "base"),
            "output": str(tmp_path / name),
            "pretrain.steps": None,
            "pretrain.epochs": 1,
            "distill.steps": 4,
            "log_samples": True,
            "save_every": 2,
            "text.overlap": 6,
            "mlm.whole_word": True,
            **more,
        }

    pretrain, distill = {"stage": "pretrain"}, {"stage": "distill", "teacher.mode": "cached"}
    printed = run_cases(
        tmp_path / "two",
        [
            case("two", **pretrain),
            case("two", **distill),
            case("cut", **pretrain, leave_at="counting windows"),
            case("cut", **pretrain, leave_at="pretrain: step 4"),
        ],
    )
    assert "texts, 10 of them long, make" in printed
    # As after a kill: what was done since the checkpoint is lost.
    kept = sorted((tmp_path / "cut" / "pretrain" / "checkpoints").glob("step-*"))
    assert len(kept) == 2
    shutil.rmtree(kept[1])
    run_cases(tmp_path / "again", [case("cut", **pretrain), case("cut", **distill)])
    run_cases(tmp_path / "one", [case("one", **pretrain), case("one", **distill)], ranks=1)

    for stage in ("pretrain", "distill-1"):
        two, cut = (
            load_file(tmp_path / name / stage / "export" / "model.safetensors")
            for name in ("two", "cut")
        )
        assert all(torch.equal(two[key], cut[key]) for key in two)
        logs = [samples(tmp_path / name / stage) for name in ("two", "cut", "one")]
        assert logs[0] == logs[1] == logs[2]
        lines = [metrics(tmp_path / name / stage) for name in ("two", "one")]
        for one, other in zip(*lines, strict=True):
            assert one["loss/loss"] == pytest.approx(other["loss/loss"], rel=1e-4)
    record = json.loads((tmp_path / "two" / "pretrain" / "result.json").read_text())
    count = record["record"]["text.windows"]
    assert record["steps"] == round(count / 8)
    assert len(np.load(tmp_path / "two" / "distill-1" / "teacher" / "features.npy")) == count


def samples(stage: Path) -> list[list[int]]:
    """The global batch of each step."""
    found: dict[int, list[int]] = {}
    for file in sorted((stage / "samples").iterdir()):
        for line in map(json.loads, file.read_text().splitlines()):
            found.setdefault(line["step"], []).extend(line["ids"])
    return [found[step] for step in sorted(found)]
