"""What a person sees: TensorBoard over a run's folder, opened in headless Chromium."""

import io
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfdistill.data.errors import UserError
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.monitoring import pictures
from selfdistill.engine.monitoring.monitor import Monitor
from selfdistill.launcher import screenshot

SCALARS = ("loss/mae", "optimizer/learning_rate", "speed/images_per_second")


def grid() -> torch.Tensor:
    """A picture of reconstructions, uint8 [3, H, W]."""
    shape = Shape(16, 4, 8, 1, 2, 16, 8, 1, 2, 16)
    images = torch.arange(4 * 3 * 16 * 16).reshape(4, 3, 16, 16).to(torch.uint8)
    mask = (torch.arange(16) % 2).float().expand(4, 16)
    return pictures.reconstruction(
        images, torch.zeros(4, 16, 48), mask, shape, (0.5,) * 3, (0.25,) * 3
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run with all that TensorBoard is to show, resumed once."""
    folder = tmp_path_factory.mktemp("runs")
    for start in (0, 20):
        with Monitor(
            folder / "digits" / "pretrain",
            enabled=True,
            stage="pretrain",
            steps=40,
            start=start,
            samples_per_step=8,
            log_every=5,
            quiet=True,
        ) as monitor:
            monitor.text("config", "```toml\nseed = 0\n```")
            for step in range(start + 1, 41 if start else 26):
                monitor.log(step, {tag: math.exp(-step / 10) for tag in SCALARS})
            monitor.image(start + 5, "reconstruction", grid())
    with Monitor(
        folder / "digits" / "finetune",
        enabled=True,
        stage="finetune",
        steps=10,
        samples_per_step=8,
        log_every=5,
        quiet=True,
    ) as monitor:
        monitor.confusion(10, np.eye(3, dtype=np.int64), ["one", "two", "three"])
        monitor.hparams({"seed": 3, "lr": 1e-4}, {"test/accuracy": 0.5})
    return folder


def made(folder: Path) -> Monitor:
    """A monitor of a run of one step."""
    options = {"stage": "pretrain", "steps": 1, "samples_per_step": 1, "log_every": 1}
    return Monitor(folder, enabled=True, quiet=True, **options)


def colours(png: bytes) -> int:
    """How many colours a picture has; a blank page has one, an empty TensorBoard a few."""
    found = Image.open(io.BytesIO(png)).convert("RGB").getcolors(maxcolors=1 << 24)
    return len(found or [])


@pytest.mark.browser
def test_scalar_charts_are_drawn(runs: Path, tmp_path: Path) -> None:
    picture = tmp_path / "docs" / "scalars.png"
    command = [sys.executable, "-m", "launcher.screenshot", str(runs), str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for tag in (*SCALARS, "test/accuracy"):
        assert tag in done.stdout
    assert colours(picture.read_bytes()) > 200
    # Never overwritten silently.
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert "--overwrite" in again.stderr


@pytest.mark.browser
def test_time_series_shows_charts_beside_pictures(runs: Path) -> None:
    png, cards = screenshot.take(runs, "timeseries")
    shown = {(card.kind, card.name) for card in cards if card.drawn}
    assert {("scalar", tag) for tag in SCALARS} <= shown
    assert {("image", "reconstruction"), ("image", "confusion")} <= shown
    assert colours(png) > 200


@pytest.mark.browser
def test_pictures_are_there_pixel_by_pixel(runs: Path) -> None:
    png, cards = screenshot.take(runs, "images", actual_size=True, tags="reconstruction")
    assert cards == [screenshot.Card("image", "reconstruction", True)]
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    page = grid().numpy().transpose(1, 2, 0)
    corner = page[:16, :16]
    rows, columns = (pixels.shape[i] - page.shape[i] for i in (0, 1))
    starts = np.argwhere((pixels[2:rows, 2:columns] == page[2, 2]).all(axis=-1))
    near = [(r, c) for r, c in starts if np.array_equal(pixels[r : r + 16, c : c + 16], corner)]
    assert any(
        np.array_equal(pixels[r : r + page.shape[0], c : c + page.shape[1]], page) for r, c in near
    )


@pytest.mark.browser
def test_hparams_list_the_run_itself(runs: Path) -> None:
    _, cards = screenshot.take(runs, "hparams")
    assert screenshot.Card("row", "digits/finetune", True) in cards


@pytest.mark.browser
def test_config_is_shown_as_text(runs: Path) -> None:
    _, cards = screenshot.take(runs, "text")
    assert cards == [screenshot.Card("text", "config/text_summary", True)]


@pytest.mark.browser
def test_a_long_config_is_shown_to_its_end_on_a_page_that_fits(tmp_path: Path) -> None:
    lines = [f"option_{i} = {i}" for i in range(100)]
    with made(tmp_path) as monitor:
        monitor.text("config", "\n".join(["```toml", *lines, f'last = "{"█" * 40}"', "```"]))
    png, cards = screenshot.take(tmp_path, "text")
    assert cards == [screenshot.Card("text", "config/text_summary", True)]
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    assert 1500 < len(pixels) < 3000
    dark = (pixels < 80).all(axis=-1).sum(axis=1)
    assert dark.max() > 200, "the last line's blocks are not to be seen"
    assert np.argmax(dark) > len(pixels) * 0.8


@pytest.mark.browser
def test_a_tab_without_anything_is_said(tmp_path: Path) -> None:
    with made(tmp_path) as monitor:
        monitor.log(1, {"loss": 1.0})
    with pytest.raises(UserError, match="nothing to see"):
        screenshot.take(tmp_path, "hparams", timeout=20)


def test_what_no_tag_matches_is_said_before_anything_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screenshot, "tensorboard", lambda _: pytest.fail("started"))
    with made(tmp_path / "a") as monitor:
        monitor.log(1, {f"loss/{i:02d}": 1.0 for i in range(12)})
        monitor.text("config", "x")
    for tab, tags, said in (
        (
            "scalars",
            "nothing",
            r"no tag matches /nothing/ .*there are loss/00, .*loss/07 and 4 more",
        ),
        ("timeseries", "Loss", r"no tag matches /Loss/ .*loss/00"),
        ("text", "loss", r"no tag matches /loss/ .*there are config/text_summary$"),
        ("scalars", "(", r"--tags \(: no regular expression"),
        ("images", "", r"tab images: nothing to see"),
    ):
        with pytest.raises(UserError, match=said):
            screenshot.take(tmp_path, tab, tags=tags)


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        (["{empty}", "{empty}/x.png"], "name a folder of runs"),
        (["{empty}", "{empty}/x.png", "--tab", "scalar"], "Did you mean scalars?"),
        (["{empty}", "{empty}/x.jpg"], "ends in .png"),
        (["{empty}", "{empty}/x.png", "--overwite"], "Did you mean --overwrite?"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], cure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        screenshot.cli.run(screenshot.screenshot, [w.format(empty=tmp_path) for w in words])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert cure in said
