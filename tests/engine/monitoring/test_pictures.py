"""Pictures checked pixel by pixel, against patches cut by hand."""

import html
import re

import numpy as np
import pytest
import torch
from tensorboard.plugin_util import markdown_to_safe_html
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from selfdistill.engine.models.images.patches import patchify
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.monitoring import pictures
from selfdistill.engine.monitoring import texts as text_kind
from tests.kit import texts as text_kit

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SHAPE = Shape(16, 4, 8, 1, 2, 16, 8, 1, 2, 16)
GAP = 2


def example(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """uint8 images, the same normalised, and a mask of half of the patches."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (3, 3, 16, 16), generator=generator).to(torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    mask = (torch.rand(3, 16, generator=generator) < 0.5).float()
    return images, (images / 255 - mean) / std, mask


def tile(page: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """A picture of the grid, 8 times enlarged, back at its size."""
    side = 16 * 8
    top, left = GAP + row * (side + GAP), GAP + column * (side + GAP)
    cut = page[:, top : top + side, left : left + side]
    small = cut[:, ::8, ::8]
    # Enlarged without smoothing: every 8 x 8 square has one colour.
    assert torch.equal(small.repeat_interleave(8, 1).repeat_interleave(8, 2), cut)
    return small


def test_a_rectangle_comes_whole() -> None:
    """A perfect prediction of 8 x 16 pixels: rows 0 and 2 of the page are the images."""
    shape = Shape((8, 16), 4, 8, 1, 2, 16, 8, 1, 2, 16, normalize_pixels=False)
    images = example()[0][:, :, 4:12]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    target = patchify((images / 255 - mean) / std, 4)
    mask = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1.0]).expand(3, -1)
    page = pictures.reconstruction(images, target, mask, shape, MEAN, STD)
    assert page.shape == (3, 3 * (64 + GAP) + GAP, 3 * (128 + GAP) + GAP)
    for row in (0, 2):
        for column in range(3):
            top, left = GAP + row * (64 + GAP), GAP + column * (128 + GAP)
            small = page[:, top : top + 64 : 8, left : left + 128 : 8].int()
            assert (small - images[column].int()).abs().max() <= 1
    top = GAP + 64 + GAP
    grey = (page[:, top : top + 64 : 8, GAP : GAP + 128 : 8] == 128).all(0)
    hidden = mask[0].view(2, 4).bool().repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal(grey, hidden)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("normalize_pixels", [False, True])
def test_a_perfect_prediction_gives_the_original(normalised: bool, normalize_pixels: bool) -> None:
    shape = Shape(16, 4, 8, 1, 2, 16, 8, 1, 2, 16, normalize_pixels=normalize_pixels)
    images, pixels, mask = example()
    target = patchify(pixels, 4)
    if normalize_pixels:  # as in the loss
        target = (target - target.mean(-1, True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    # What is predicted at visible patches must not show.
    prediction = torch.where(mask.bool().unsqueeze(-1), target, torch.full_like(target, 99.0))
    given = pixels if normalised else images
    page = pictures.reconstruction(given, prediction, mask, shape, MEAN, STD)
    assert page.dtype == torch.uint8
    assert page.shape == (3, 3 * (128 + GAP) + GAP, 3 * (128 + GAP) + GAP)
    for column in range(3):
        for row in (0, 2):
            difference = tile(page, row, column).int() - images[column].int()
            assert difference.abs().max() <= 1


def test_masked_row_hides_exactly_the_masked_patches() -> None:
    images, _, mask = example(1)
    page = pictures.reconstruction(images, torch.zeros(3, 16, 48), mask, SHAPE, MEAN, STD)
    for column in range(3):
        shown = tile(page, 1, column)
        for patch in range(16):
            top, left = 4 * (patch // 4), 4 * (patch % 4)
            square = shown[:, top : top + 4, left : left + 4]
            if mask[column, patch]:
                assert (square == 128).all()
            else:
                assert torch.equal(square, images[column, :, top : top + 4, left : left + 4])


def test_predictions_get_each_patchs_own_mean_and_deviation() -> None:
    images, _, mask = example(2)
    page = pictures.reconstruction(images, torch.zeros(3, 16, 48), mask, SHAPE, MEAN, STD)
    column, patch = 1, int(mask[1].nonzero()[0])
    top, left = 4 * (patch // 4), 4 * (patch % 4)
    shown = tile(page, 2, column)[:, top : top + 4, left : left + 4]
    # A prediction of zero is the patch's mean, over its channels in the normalised scale.
    original = images[column, :, top : top + 4, left : left + 4].double() / 255
    scale = torch.tensor(STD, dtype=torch.float64).view(3, 1, 1)
    shift = torch.tensor(MEAN, dtype=torch.float64).view(3, 1, 1)
    level = ((original - shift) / scale).mean()
    expected = ((level * scale + shift).clamp(0, 1) * 255).expand(3, 4, 4)
    assert (shown.double() - expected).abs().max() <= 1


def test_at_most_count_images_and_large_ones_keep_their_size() -> None:
    images = torch.zeros(5, 3, 224, 224, dtype=torch.uint8)
    shape = Shape(224, 16, 8, 1, 2, 16, 8, 1, 2, 16)
    page = pictures.reconstruction(
        images, torch.zeros(5, 196, 768), torch.ones(5, 196), shape, MEAN, STD, count=2
    )
    assert page.shape == (3, 3 * (224 + GAP) + GAP, 2 * (224 + GAP) + GAP)


@pytest.mark.parametrize("classes", [1, 2, 10, 26, 200, 201, 1203])
def test_confusion_matrix_fits_and_shows_the_diagonal(classes: int) -> None:
    matrix = np.eye(classes, dtype=np.int64) * 7
    names = [f"class {i} with a rather long name indeed" for i in range(classes)]
    page = pictures.confusion(matrix, names)
    assert page.dtype == np.uint8
    assert page.shape[0] == 3
    assert page.shape[1] == page.shape[2] < 3200
    night = (page == pictures.COLOURS[-1].reshape(3, 1, 1)).all(axis=0)
    rows, columns = np.nonzero(night)
    # The dark squares are there, and on the diagonal alone.
    assert len(rows) > 100
    cell = max(1000 // min(classes, 500), 1)
    assert np.abs((rows - rows.min()) - (columns - columns.min())).max() <= max(cell, 13)


def test_confusion_rows_are_true_and_labels_tell_classes_apart() -> None:
    names = ["ab", "cd", "ef"]
    wrong = pictures.confusion(np.array([[1, 0, 0], [0, 1, 0], [5, 0, 0]]), names)
    other = pictures.confusion(np.array([[1, 0, 5], [0, 1, 0], [0, 0, 1]]), names)
    night = [(page == pictures.COLOURS[-1].reshape(3, 1, 1)).all(axis=0) for page in (wrong, other)]
    # Third class taken for the first: the lowest dark square lies at the left.
    lowest = np.nonzero(night[0][np.nonzero(night[0])[0].max()])[0]
    leftmost = np.nonzero(night[0])[1].min()
    assert lowest.min() == leftmost
    assert not np.array_equal(wrong, other)
    renamed = pictures.confusion(np.array([[1, 0, 0], [0, 1, 0], [5, 0, 0]]), ["ab", "cx", "ef"])
    assert renamed.shape == wrong.shape
    assert not np.array_equal(renamed, wrong)


def cells(tokenizer, texts, masked, predicted=None) -> tuple[list[str], str]:
    """The table's cells below its head as a browser shows them, and the page's HTML.

    `masked` gives the columns of each text that are masked; predicted is `predicted`, or the
    original.
    """
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    ids = batch["input_ids"]
    at = torch.tensor(
        [row * ids.shape[1] + column for row, columns in enumerate(masked) for column in columns]
    ).long()
    guess = ids.reshape(-1)[at] if predicted is None else torch.full_like(at, predicted)
    page = markdown_to_safe_html(text_kind.shown(batch | {"masked_at": at}, guess, tokenizer))
    found = re.findall(r"<td>(.*?)</td>", page, re.DOTALL)
    return [html.unescape(re.sub("</?strong>", "", cell)) for cell in found], page


def test_users_texts_are_shown_as_they_are() -> None:
    tokenizer = text_kit.make_tokenizer()
    texts = [
        "see [the cell](http://x.org) and `protein` [1]: x",
        "a *robust* __parser__ <b>free</b> | word &amp; order <script>",
        "# 1. **we** ![are](u) \\* ~~~ --- happy",
        "größe 漢字 e\u0301, the divides",
    ]
    found, page = cells(tokenizer, texts, [[], [], [], []])
    assert found == texts
    tags = {tag.strip("/") for tag in re.findall(r"<(/?[a-z]+)", page)}
    assert tags == {"table", "thead", "tbody", "tr", "th", "td"}
    # Every second token masked: what they hide stands in brackets, in bold, and nothing is lost.
    masked = [range(1, len(tokenizer(text)["input_ids"]) - 1, 2) for text in texts[:3]]
    found, page = cells(tokenizer, texts[:3], masked)
    assert page.count("<strong>") == sum(map(len, masked))
    for cell, text in zip(found, texts, strict=False):
        pairs = re.sub(r"\[(\S+) → \1\]", lambda m: m[1].replace("␣", ""), cell)
        assert pairs.replace(" ", "") == text.replace(" ", "")


def test_masks_inside_words_add_no_space_and_special_tokens_are_left_out() -> None:
    tokenizer = text_kit.make_tokenizer()
    ids = tokenizer("the divides", "robust")["input_ids"]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert pieces[1:7] == ["the", "Ġ", "di", "v", "ide", "s"], pieces
    the = ids[1]
    assert cells(tokenizer, ["the divides"], [[4]], the)[0] == ["the di[v → the]ides"]
    assert cells(tokenizer, ["the divides"], [[3, 4]], the)[0] == ["the [di → the][v → the]ides"]
    assert cells(tokenizer, ["the divides"], [[2]], the)[0] == ["the [␣ → the]divides"]
    assert cells(tokenizer, [("the", "robust")], [[1]])[0] == ["[the → the] | robust"]


def test_masks_inside_words_of_wordpiece() -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cell", "play", "##ing", "##s"]
    raw = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.WordPiece()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", **names)
    texts = ["the cell playings", "odd the"]
    assert cells(tokenizer, texts, [[], []])[0] == ["the cell playings", "[UNK] the"]
    shown = cells(tokenizer, texts, [[4], [2]], words.index("##s"))[0]
    assert shown == ["the cell play[ing → s]s", "[UNK] [the → s]"]


def test_texts_with_a_mask_to_be_seen_come_first() -> None:
    tokenizer = text_kit.make_tokenizer()
    texts = [f"the cell {i}" for i in range(6)]
    texts[0] = "the " * 70
    beyond = text_kind.LENGTH + 2
    found, _ = cells(tokenizer, texts, [[beyond], [], [3], [], [1], []])
    assert [bool(re.search("→", cell)) for cell in found] == [True, True, False, False]
    assert found[0] == "the [ce → ce]ll 2"
    assert found[1] == "[the → the] cell 4"
    assert found[3] == "the cell 1"
