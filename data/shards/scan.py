"""The samples of a tar made elsewhere: which files belong together, and which are labels.

Members are grouped as WebDataset groups them: the key ends at the first dot of the base name, the
extension is all that follows, neighbours with one key are one sample.
"""

import itertools
import re
import shlex
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from selfdistill.data import files
from selfdistill.data.errors import UserError
from selfdistill.data.formats import depth, images, labels
from selfdistill.data.shards import manifest, tars
from selfdistill.data.shards.store import Store

LABELS = ("cls", "txt", "json")
#: In place of a label's extension: the class is the folder.
FOLDER = "folder"
# First bytes of what people compress tars with.
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def compressed(name: str, kind: str = "") -> str:
    """What is wrong with a compressed tar, and the cure: images hardly shrink by it."""
    suffixes = {".tgz": "gzip", ".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
    tool = kind or suffixes.get(PurePosixPath(name).suffix.lower(), "")
    plain = re.sub(r"(\.tar)?\.(tgz|gz|bz2|xz|zst|tar)$", "", name, flags=re.IGNORECASE)
    made = f"{plain}-plain.tar" if name.lower() == f"{plain}.tar".lower() else f"{plain}.tar"
    how = f" ({tool} -dc < {shlex.quote(name)} > {shlex.quote(made)})" if tool else ""
    return (
        f"is compressed{f' ({tool})' if tool else ''}, so its samples cannot be read by their"
        f" place: decompress it{how}; or, if it holds class folders, pack it (python -m data.pack)"
    )


class Scanned(NamedTuple):
    """What one tar holds.

    Attributes:
        shard: Name, hash and size.
        rows: int64 [n, 4], of members.npy.
        labels: int64 [n], -1 for none; where there are `names`, places among these.
        extras: Names of the members that belong to no sample.
        values: Of its pictures of more than 8 bits; None if there are none.
        names: Classes by name, in the order in which they came.
        incomplete: Keys of samples without a picture, which were left out.
        unused: How many files of samples are neither picture nor label, by extension.
    """

    shard: manifest.ShardInfo
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    extras: list[str]
    values: depth.Seen | None
    names: Sequence[str]
    incomplete: Sequence[str]
    unused: Counter[str]

    def renumbered(self, numbers: Sequence[int]) -> "Scanned":
        """The same with classes of other numbers, `numbers` being those of `names`.

        The tar has no such number, so the table holds it itself, see `manifest.IN_TABLE`.
        """
        found = np.array(numbers, np.int64)[self.labels]
        rows = self.rows.copy()
        rows[:, 2], rows[:, 3] = manifest.IN_TABLE, found
        return self._replace(rows=rows, labels=found, names=())


class _Sample(NamedTuple):
    key: str
    members: dict[str, tars.Member]


def _members(found: Sequence[tars.Member]) -> Iterator[tuple[str, str, tars.Member]]:
    """Key, extension and place of a tar's files, less those that belong to no sample."""
    for member in found:
        split = tars.split_name(member.name)
        if split is not None and tars.of_sample(member.name):
            yield *split, member


def _samples(path: Path, found: Sequence[tars.Member]) -> Iterator[_Sample]:
    """A tar's samples: neighbouring members with one key."""
    seen: set[str] = set()
    sample: _Sample | None = None
    for key, extension, member in _members(found):
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            if key in seen:
                raise UserError(
                    f"shard {path}, sample {key}: the key comes twice, not side by side: give"
                    " every sample a key of its own and keep its files together (tar --sort=name)"
                )
            seen.add(key)
            sample = _Sample(key, {})
        if extension in sample.members:
            raise UserError(
                f"shard {path}, sample {key}: two files .{extension}: give every sample a key of"
                " its own (it ends at the first dot of the file's name)"
            )
        sample.members[extension] = member
    if sample is not None:
        yield sample


def _scattered(found: Sequence[tars.Member]) -> set[str]:
    """Keys whose files stand in more than one place of a tar."""
    runs = Counter(key for key, _ in itertools.groupby(key for key, _, _ in _members(found)))
    return {key for key, count in runs.items() if count > 1}


def _stem(extension: str) -> str:
    """What a file's name has between key and suffix: "right" of p17.right.jpg."""
    return extension.rpartition(".")[0]


def _belongs(sample: _Sample, image: str, label: Sequence[str]) -> bool:
    """Whether the files of a key are, or should be, a sample: not a README.md, say."""
    suffixes = {extension.rpartition(".")[2] for extension in sample.members}
    return (
        image in sample.members
        or any(f".{suffix}" in images.SUFFIXES for suffix in suffixes)
        or not suffixes.isdisjoint(label)
        or not sample.members.keys().isdisjoint(label)
    )


def _images(sample: _Sample, wanted: str) -> list[str]:
    """Extensions of the files that may be the sample's input."""
    found = [
        extension
        for extension in sample.members
        if (extension == wanted if wanted != "auto" else f".{extension}" in images.SUFFIXES)
    ]
    if not found and wanted == "auto":
        # A key with dots: "a.b.jpg" is sample "a" with extension "b.jpg".
        found = [e for e in sample.members if "." + e.rpartition(".")[2] in images.SUFFIXES]
    return found


def _image(path: Path, sample: _Sample, wanted: str, found: Sequence[tars.Member]) -> str:
    """Extension of the sample's input, among the files of its tar."""
    inputs = _images(sample, wanted)
    where = f"shard {path}, sample {sample.key}"
    has = ", ".join(f".{extension}" for extension in sample.members)
    if not inputs and sample.key in _scattered(found):
        raise UserError(
            f"{where}: its files do not stand together in the tar: make the tar anew, with its"
            " files in order (tar --sort=name)"
        )
    if not inputs:
        kind = "image" if wanted == "auto" else f".{wanted}"
        raise UserError(
            f"{where}: no {kind} among its files ({has}): leave such samples out"
            " (--skip_incomplete), or name the images' extension (--image EXTENSION)"
        )
    if len(inputs) > 1:
        raise UserError(
            f"{where}: more than one image among its files ({has}): say which (--image EXTENSION);"
            " or, if they are different samples, rename them (a key ends at the first dot)"
        )
    return inputs[0]


def _label(path: Path, sample: _Sample, image: str, wanted: Sequence[str], named: bool) -> str:
    """Extension of the sample's label; "" if it has none.

    Args:
        path: The tar.
        sample: Of it.
        image: Extension of the input.
        wanted: Names of labels.
        named: The user has named the extension of the image or of the label, and so says that all
            files of a key are one sample, whatever stands between key and suffix.
    """
    found = [e for w in wanted for e in sample.members if e == w or e.endswith(f".{w}")]
    own = [e for e in found if _stem(e) == _stem(image)]
    exact = [e for e in wanted if e in sample.members]
    if named and (own or exact):
        return (own or exact)[0]
    others = [e for e in found if e not in own]
    if own:  # seg.json beside cls is a note; left.cls beside right.cls a label without its image
        others = [e for e in others if e.rpartition(".")[2] == own[0].rpartition(".")[2]]
    if others:
        raise UserError(
            f"shard {path}, sample {sample.key}: .{others[0]} is not the label of .{image}, for"
            " their names differ before the last dot: give each image its own, or, if a key's files"
            f" are one sample, say which is its label (--image {image} --label"
            f" {(own or others)[0]})"
        )
    return own[0] if own else ""


def _content(path: Path, sample: _Sample, extension: str, file: BinaryIO) -> bytes:
    """The sample's label member."""
    member = sample.members[extension]
    if member.size > labels.LARGEST:
        raise UserError(
            f"shard {path}, sample {sample.key}: its label .{extension} has {member.size:,} bytes:"
            " name another file (--label EXTENSION), or take none (--unlabelled)"
        )
    file.seek(member.offset)
    return file.read(member.size)


def _class(path: Path, sample: _Sample, extension: str, file: BinaryIO) -> tuple[int, int, int]:
    """Offset and length of the sample's label member, and its class number; -1 each if none."""
    if not extension:
        return -1, -1, -1
    member, content = sample.members[extension], _content(path, sample, extension, file)
    try:
        return member.offset, member.size, labels.parse(content)
    except ValueError as error:
        raise UserError(
            f"shard {path}, sample {sample.key}: {error} (.{extension}): write the number of its"
            " class there, or name another file (--label EXTENSION), or take none (--unlabelled)"
        ) from None


def _name(
    path: Path, sample: _Sample, image: str, extension: str, field: str | None, file: BinaryIO
) -> str:
    """The sample's class by name: what stands in a field of its JSON, or its folder."""
    where = f"shard {path}, sample {sample.key}"
    if field is None:
        folder = PurePosixPath(sample.members[image].name).parent.name
        if not folder:
            raise UserError(
                f"{where}: it lies in no folder, which --label folder takes for the class: make the"
                " tar anew from class folders"
            )
        return folder
    if not extension:
        raise UserError(
            f"{where}: it has no .json with the field {field!r}: name the file (--label EXTENSION),"
            " or take no labels (--unlabelled)"
        )
    try:
        return labels.by_name(_content(path, sample, extension, file), field)
    except ValueError as error:
        raise UserError(
            f"{where}: {error} (.{extension}): correct it, name another (--label_field), or take"
            " no labels (--unlabelled)"
        ) from None


def _values(picture: tars.Member, file: BinaryIO) -> depth.Seen | None:
    """The values of a picture of more than 8 bits; None of others."""
    file.seek(picture.offset)
    head = file.read(min(picture.size, depth.HEAD))
    if picture.size > files.LARGEST or not depth.may_be_deep(head):
        return None
    return images.values(head + file.read(picture.size - len(head)))


def scan(
    path: Path,
    image: str = "auto",
    label: str = "auto",
    unlabelled: bool = False,
    field: str | None = None,
    skip_incomplete: bool = False,
) -> Scanned:
    """Reads one tar.

    Args:
        path: The tar.
        image: Extension of the inputs; "auto" for any image's.
        label: Extension of the labels; "auto" for the first of .cls, .txt, .json; or `FOLDER`.
        unlabelled: Take no labels.
        field: In which a label's JSON names the class.
        skip_incomplete: Leave out samples without a picture, or with an empty one.

    Returns:
        Its name, hash and samples.

    Raises:
        UserError: It is compressed or broken, or a sample is not as it should be.
    """
    with path.open("rb") as file:
        head = file.read(8)
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            raise UserError(f"{path} {compressed(path.name, kind)}")
    named = not unlabelled and (label == FOLDER or field is not None)
    any_ = LABELS if field is None else LABELS[-1:]
    wanted = () if unlabelled or label == FOLDER else any_ if label == "auto" else (label,)
    names: dict[str, int] = {}
    rows: list[tuple[int, ...]] = []
    numbers: list[int] = []
    extras: list[str] = []
    values: list[depth.Seen] = []
    incomplete: list[str] = []
    unused: Counter[str] = Counter()
    try:
        found = tars.scan(path)
        extras += [m.name for m in found if not tars.of_sample(m.name)]
        scattered = _scattered(found) if skip_incomplete else set[str]()
        with path.open("rb") as file:
            for sample in _samples(path, found):
                if not _belongs(sample, image, (*LABELS, *wanted)):
                    extras += [member.name for member in sample.members.values()]
                    continue
                whole = any(sample.members[one].size for one in _images(sample, image))
                if skip_incomplete and not whole and sample.key not in scattered:
                    incomplete.append(sample.key)
                    continue
                if wanted and labels.SEVERAL in sample.members:
                    raise UserError(
                        f"shard {path}, sample {sample.key}: its .{labels.SEVERAL} has several"
                        " labels, of which this command makes no index: keep the manifest.json"
                        " that data.pack wrote, or take no labels (--unlabelled)"
                    )
                input_ = _image(path, sample, image, found)
                target = _label(path, sample, input_, wanted, (image, label) != ("auto", "auto"))
                if named:
                    name = _name(path, sample, input_, target, field, file)
                    place, number = [-1, -1], names.setdefault(name, len(names))
                else:
                    *place, number = _class(path, sample, target, file)
                picture = sample.members[input_]
                rows.append((picture.offset, picture.size, *place))
                numbers.append(number)
                others = [e for e in sample.members if e not in (input_, target)]
                unused.update(extension.rpartition(".")[2] for extension in others)
                deep = _values(picture, file)
                values += [] if deep is None else [deep]
    except tarfile.TarError as error:
        raise UserError(f"{path} is no whole tar ({error}): copy it again") from None
    shard = manifest.ShardInfo(path.name, tars.sha256_of(path), path.stat().st_size, len(rows))
    return Scanned(
        shard,
        np.array(rows, dtype=np.int64).reshape(-1, 4),
        np.array(numbers, dtype=np.int64),
        extras,
        depth.joined(values) if values else None,
        list(names),
        incomplete,
        unused,
    )


def keep(shared: Store, group: str, number: int, found: Scanned) -> None:
    """Writes what a tar holds into a folder of several launches."""
    told = found._asdict() | {"values": found.values and found.values._asdict()}
    arrays = {name: told.pop(name) for name in ("rows", "labels")}
    shared.keep(group, number, told, **arrays)


def kept(shared: Store, group: str, number: int) -> Scanned:
    """What another launch found in a tar."""
    told, arrays = shared.kept(group, number)
    values = told["values"]
    return Scanned(
        manifest.ShardInfo(*told["shard"]),
        arrays["rows"],
        arrays["labels"],
        told["extras"],
        None if values is None else depth.Seen(**values),
        told["names"],
        told["incomplete"],
        Counter(told["unused"]),
    )
