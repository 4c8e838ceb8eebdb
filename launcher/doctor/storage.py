"""Data and disks as `python -m launcher.doctor` finds them: shards, run folder, free space."""

import contextlib
import errno
import io
import os
import shutil
import tempfile
from pathlib import Path

from selfdistill.data import splits, verify
from selfdistill.data.errors import UserError
from selfdistill.data.shards import manifest
from selfdistill.data.shards.manifest import Manifest
from selfdistill.launcher.doctor.checks import Line

#: Bytes of a checkpoint for each parameter: fp32 weights and AdamW's two moments.
BYTES = 12

#: Free bytes below which a run folder is doubtful where the model's size is not known.
LITTLE = 10e9


def probe(folder: Path) -> Path:
    """Writes a file, which it removes again, where a folder is or would be made.

    Returns:
        The folder, or the nearest one above it that exists.

    Raises:
        UserError: a file is in the way.
        OSError: it cannot be written to.
    """
    place = folder.absolute()
    while not place.is_dir():
        if os.path.lexists(place):
            raise UserError(f"{place} is not a folder, {folder} needs one there: choose another")
        place = place.parent
    # Written for real: permission bits say nothing of quotas, mounts, or what root may do.
    with tempfile.TemporaryFile(dir=place) as file:
        file.write(b"doctor" * 1000)
        file.flush()
        os.fsync(file.fileno())
    return place


def parameters(model: Path) -> int | None:
    """Parameters of a model on this machine, counted in the headers of its safetensors.

    Args:
        model: a folder in Hugging Face's layout, or a file.

    Returns:
        Their number; None where there are no safetensors.

    Raises:
        UserError: a file is broken.
    """
    import safetensors

    files = sorted(model.glob("*.safetensors")) if model.is_dir() else [model]
    total = 0
    for file in files:
        if file.suffix != ".safetensors" or not file.is_file():
            return None
        try:
            with safetensors.safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no dict
                    size = 1
                    for side in opened.get_slice(name).get_shape():
                        size *= side
                    total += size
        except safetensors.SafetensorError as error:
            raise UserError(f"{file} cannot be read ({error}): fetch it again") from None
    return total or None


def run_folder(output: Path, model: str | None = None, keep: int = 2) -> Line:
    """Whether a run folder can be made and written to, with room for a stage's checkpoints.

    Args:
        output: the run folder.
        model: its pre-trained model; counted if it is on this machine.
        keep: checkpoints that are kept. One more lies there while it is written.
    """
    try:
        free = shutil.disk_usage(probe(output)).free
    except OSError as error:
        cures = {
            errno.ENOSPC: "free space or choose another disk",
            errno.EDQUOT: "your quota is used up: free space or choose another disk",
        }
        cure = cures.get(error.errno or 0, "choose a folder where you may write")
        reason = error.strerror or str(error)
        return Line("FAILED", "run folder", f"{output} cannot be written to: {reason}", cure)
    count = parameters(Path(model)) if model and Path(model).exists() else None
    found = f"{output} can be written to, {free / 1e9:.1f} GB free"
    cure = "free space, choose another disk, or keep fewer checkpoints (--keep 1)"
    if count is not None:
        need = BYTES * count * (keep + 1)
        sum_ = (
            f"{need / 1e9:.2f} GB are needed ({BYTES} bytes x {count / 1e6:.1f} M parameters"
            f" x {keep + 1} checkpoints)"
        )
        if free < need:
            return Line("FAILED", "run folder", f"{found}, {sum_}", cure)
        return Line("ok", "run folder", f"{found}; {sum_}")
    if free < LITTLE:
        return Line("warning", "run folder", f"{found}: little for checkpoints", cure)
    return Line("ok", "run folder", found)


def shards(data: str, full: bool = False) -> Line:
    """Whether the shards of a data set are there, whole, and as the manifest says.

    Args:
        data: its folder or URL, or that of one of its splits.
        full: hash every shard (`data.verify`); otherwise only the files' sizes are compared.
    """
    if full:
        return _hashed(data)
    away = manifest.is_remote(data)
    if not away and not Path(data).is_dir():
        raise UserError(f"no data set at {data}: pack it first (python -m data.pack SOURCE {data})")
    found: list[Manifest] = []
    for root in [data, *(manifest.join(data, split) for split in splits.SPLITS)]:
        if away:
            from selfdistill.data.remote.cache import NotThere

            with contextlib.suppress(NotThere):
                found.append(Manifest.load(root))
        elif (Path(root) / manifest.FILE).exists():
            found.append(Manifest.load(root))
    if not found:
        raise UserError(
            f"no {manifest.FILE} in {data}: pack data into it (python -m data.pack SOURCE {data})"
        )
    wrong, remote = [], 0
    for file in found:
        for number, info in enumerate(file.shards):
            place = file.shard_place(number)
            if manifest.is_remote(place):
                remote += 1
            elif not Path(place).is_file():
                wrong.append(f"{place} is missing")
            elif (size := Path(place).stat().st_size) != info.bytes:
                wrong.append(f"{place} has {size} bytes, not {info.bytes}")
        if not away:
            _ = file.members  # opened, and hashed where that is quick
    if wrong:
        others = f", and {len(wrong) - 1} more shards like it" if len(wrong) > 1 else ""
        cure = f"copy what is broken again; python -m data.verify {data} names all"
        return Line("FAILED", "data", wrong[0] + others, cure)
    count, samples = sum(len(f.shards) for f in found), sum(f.samples for f in found)
    size = sum(info.bytes for f in found for info in f.shards)
    what = f"{samples} samples in {count} shards, {size / 1e6:.1f} MB"
    how = "sizes are right, hashes were not looked at (--full true)"
    if remote:
        how = f"{remote} of them remote, looked at when they are fetched"
    return Line("ok", "data", f"{data}: {', '.join(f.split for f in found)}: {what}; {how}")


def _hashed(data: str) -> Line:
    """What `data.verify` says, on one line."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            verify.verify(data)
    except UserError:
        lines = printed.getvalue().splitlines()
        if not lines:
            raise
        others = f" (and {len(lines) - 1} more: python -m data.verify {data})" if lines[1:] else ""
        return Line("FAILED", "data", lines[0] + others)
    return Line("ok", "data", printed.getvalue().strip())
