"""Members of a tar that are no plain files of a sample."""

import io
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from selfdistill.data.index import index
from selfdistill.data.loading.reader import Reader
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.verify import verify
from tests.data.shards.test_tars import member, refusal, three
from tests.kit.command import call
from tests.kit.shards import numbered, png


@pytest.mark.parametrize(
    ("info", "said"),
    [
        (member("x.png", tarfile.SYMTYPE, "/etc/x.png"), "the link x.png leads to /etc/x.png"),
        (member("x.png", tarfile.SYMTYPE, "../x.png"), "the link x.png leads to ../x.png"),
        (member("x.png", tarfile.LNKTYPE, "gone.png"), "the link x.png leads to gone.png"),
        (member("x.png", tarfile.SYMTYPE, "x.png"), "the link x.png leads in a circle"),
        (member("x.png", b"M"), "x.png at byte"),
        (member("x.png", b"S"), "x.png at byte"),
    ],
)
def test_what_cannot_be_read_by_place_is_named(
    info: tarfile.TarInfo, said: str, tmp_path: Path
) -> None:
    three(tmp_path / "a.tar", info)
    assert said in refusal(tmp_path / "a.tar")


def test_sparse_files_of_gnu_tar_are_named(tmp_path: Path) -> None:
    """Their bytes do not lie in one piece, whatever the format calls their size."""
    (tmp_path / "a.png").write_bytes(b"x")
    os.truncate(tmp_path / "a.png", 200_000)
    for form in ("gnu", "pax"):
        command = ["tar", "--sparse", f"--format={form}", "-cf", tmp_path / "s.tar"]
        subprocess.run([*command, "-C", tmp_path, "a.png"], check=True)
        assert "stored in parts" in refusal(tmp_path / "s.tar")


def test_other_members_are_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["README", "README.md", "Thumbs.db", "._k0.png", "a.heic", "b.heic", "docs"]
    infos = [member(name) for name in names]
    infos += [member("folder", tarfile.DIRTYPE), member("latest", tarfile.SYMTYPE, "folder")]
    three(tmp_path / "train" / "a.tar", *infos)
    assert call(index, tmp_path) == 0
    out = capsys.readouterr().out
    assert "3 samples" in out
    assert "7 files belong to no sample" in out
    assert "2 .heic" in out
    # A label whose image is lost is no such file.
    three(tmp_path / "train" / "a.tar", member("x.cls"))
    assert call(index, tmp_path, "--overwrite") == 2
    assert "sample x: no image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("members", "options", "labels"),
    [
        # 05: a label whose image is missing, before another one of the same key.
        (("p.left.cls", "p.right.cls", "p.right.png"), (), None),
        (("p.left.txt", "p.right.txt", "p.right.png"), (), None),
        (("p.left.cls", "p.right.png"), (), None),
        (("p.cls", "p.right.png"), (), None),
        (("p.png", "p.meta.json"), (), None),
        # The whole stem is shared.
        (("p.right.cls", "p.right.png"), (), [0]),
        (("p.png", "p.cls", "p.notes.json"), (), [1]),
        # The user says that all files of a key are one sample.
        (("p.cls", "p.img.png"), ("--image", "img.png"), [0]),
        (("p.png", "p.meta.json"), ("--label", "meta.json"), [1]),
        (("p.png", "p.seg.png", "p.cls"), ("--image", "png"), [2]),
        (("p.left.cls", "p.right.cls", "p.right.png"), ("--image", "right.png"), [1]),
        (("p.left.cls", "p.right.png"), ("--image", "right.png", "--label", "left.cls"), [0]),
        # One sample cannot be two.
        (("p.left.png", "p.left.cls", "p.right.png", "p.right.cls"), (), None),
    ],
)
def test_a_label_belongs_to_the_image_of_its_stem(
    members: tuple[str, ...],
    options: tuple[str, ...],
    labels: list[int] | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The label of a file is its place among the members."""
    path = tmp_path / "train" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(members):
            content = {"png": png(numbered(1)), "json": b'{"label": %d}' % number}.get(
                name.rpartition(".")[2], b"%d" % number
            )
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    code = call(index, path.parent, *options)
    if labels is None:
        assert code == 2
        assert "sample p:" in capsys.readouterr().err
    else:
        assert code == 0
        file = Manifest.load(str(path.parent))
        assert [r.label for r in Reader(file).read(np.arange(file.samples))] == labels
        assert call(verify, tmp_path) == 0


def test_verify_tells_of_samples_that_an_index_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an older index of a tar with links, or with a header broken, was written."""
    from selfdistill.data.shards import manifest

    train = tmp_path / "train"
    three(train / "a.tar")
    assert call(index, train) == 0
    file = Manifest.load(str(train))
    (shard,) = file.shards
    manifest.write(
        train,
        split="train",
        classes=file.classes,
        class_counts=[2],
        shards=[shard._replace(samples=2)],
        members=np.array(file.members)[:2],
        image={"size": None},
    )
    capsys.readouterr()
    assert call(verify, tmp_path) == 2
    assert "holds 1 samples that members.npy lacks, such as k2" in capsys.readouterr().out
