"""The index of one split: which shards there are, and where each sample's bytes lie in them.

A split's folder holds ``manifest.json``, ``members.npy`` and the shards. The table of members is a
file of its own beside the JSON because it is memory-mapped: a hundred million samples cost a
process no parsing and no memory. Its sha256 stands in ``manifest.json``, so the hash of that one
file stands for all of the data.
"""

import functools
import hashlib
import io
import json
import os
from collections import Counter
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pydantic
from numpy.typing import NDArray

from selfdistill.data import files, records
from selfdistill.data.errors import UserError
from selfdistill.data.formats import depth
from selfdistill.data.formats.images import Size, size_of
from selfdistill.data.shards.places import SCHEMES as SCHEMES
from selfdistill.data.shards.places import as_typed as as_typed
from selfdistill.data.shards.places import is_address as is_address
from selfdistill.data.shards.places import is_plain as is_plain
from selfdistill.data.shards.places import is_remote as is_remote
from selfdistill.data.shards.places import join as join
from selfdistill.data.sources import unpacked
from selfdistill.data.splits import SPLITS, UNLABELLED, Metric

FORMAT = "selfdistill-shards"
FILE = "manifest.json"
MEMBERS = "members.npy"
#: In place of a label's offset: the tar has no number of the class, its column of length holds it.
IN_TABLE = -2
# The hash of a table up to this size is checked at every start (0.1 s); beyond, by data.verify.
_HASHED_BYTES = 64 * 2**20


# Of a table that is not what it should be.
_CURE = "fetch it anew, or make it anew (python -m data.pack or python -m data.index)"


class ShardInfo(NamedTuple):
    """One tar: file name (or a URL of its own), sha256 in hex, size in bytes, number of samples."""

    name: str
    sha256: str
    bytes: int
    samples: int


class _Shard(records.Record):
    name: str
    sha256: records.Hash
    bytes: records.Count
    samples: records.Count


class _Members(records.Record):
    file: str
    sha256: records.Hash


class _Text(records.Record):
    pairs: bool
    stored: Literal["txt", "json"]
    metric: Metric | None = None


_Size = Annotated[int | list[int], pydantic.AfterValidator(size_of)] | None  # None: they differ


#: Black and white of pictures of more than 8 bits.
_Range = Annotated[list[records.Finite], pydantic.Field(min_length=2, max_length=2)] | None


class _File(records.Record):
    """manifest.json, format version 1; 2 where samples have several labels."""

    format: Literal["selfdistill-shards"]
    version: Literal[1, 2]
    kind: Literal["image", "text"]
    split: str
    classes: list[str]
    class_counts: list[records.Count]
    labels: Literal["one", "several"] = "one"
    labelled: records.Count = 0
    samples: records.Count
    image: dict[str, Any] | None = None
    text: _Text | None = None
    columns: list[str] = pydantic.Field(["input", "label"])
    members: _Members
    shards: list[_Shard]


def no_set(data: str) -> str:
    """What is wrong with a folder given as a packed set, at a glance; "" where it may be one."""
    folder = Path(data)
    if is_remote(data) or any((folder / split / FILE).is_file() for split in SPLITS):
        return ""
    nothing = f"no data set at {data}: pack it first (python -m data.pack SOURCE {data})"
    return unpacked.cure(folder) or ("" if folder.is_dir() else nothing)


class Manifest:
    """The index of one split, read-only.

    Args:
        content: The bytes of manifest.json.
        root: The split's folder: a path or a URL prefix.
        cache_dir: Where the tables and shards of a remote root are kept on this node; None for the
            default of `data.remote.cache`.

    Attributes:
        root: As given.
        kind: "image" or "text".
        split: "train", "val", "test" or "unlabelled".
        classes: Names of the classes; labels are their numbers.
        class_counts: Samples of each class.
        several: Whether a sample has a list of labels, perhaps an empty one, and not one label.
        labelled: Number of samples that have a label, or a list of them.
        samples: Number of samples N; their ids are 0..N-1, the rows of `members`.
        image: What is known of the images, e.g. {"size": 64}; empty for other kinds.
        size: Of the images, None where sizes differ.
        span: Range of the values of pictures of more than 8 bits, see `data.formats.depth`.
        text: What is known of the texts, e.g. {"pairs": False, "stored": "txt"}, and where it is
            known how they are scored "metric", one of `METRICS`; empty for other kinds.
        shards: The tars, in the order of the ids.
        hash: sha256 of manifest.json in hex: the identity of the data.

    Raises:
        UserError: Not a manifest of ours, or one that contradicts itself.
    """

    def __init__(self, content: bytes, root: str, cache_dir: str | None = None) -> None:
        self.root = root
        self.cache_dir = cache_dir
        self.place = join(root, FILE)
        self.hash = hashlib.sha256(content).hexdigest()
        cure = "pack the data anew (python -m data.pack) or index the tars (python -m data.index)"
        what = f"{self.place} is no manifest of this program"
        value = records.from_json(content, what, cure)
        file = records.checked(_File, value, what, cure)
        self.kind = file.kind
        self.split = file.split
        self.classes = file.classes
        self.class_counts = file.class_counts
        self.several = file.labels == "several"
        self.labelled = file.labelled if self.several else sum(file.class_counts)
        self.samples = file.samples
        self.image = file.image or {}
        size = records.checked(_Size, self.image.get("size"), f"{what}: image.size", cure)
        self.size: Size | None = size
        span = records.checked(_Range, self.image.get("range"), f"{what}: image.range", cure)
        self.span = depth.check((span[0], span[1]), f"{what}: {cure}") if span else None
        self.text = file.text.model_dump(exclude_none=True) if file.text else {}
        self.columns = file.columns
        self.members_file = file.members
        self.members_place = join(root, file.members.file)
        self.shards = [ShardInfo(s.name, s.sha256, s.bytes, s.samples) for s in file.shards]
        if self.several != (file.version == 2):  # those who know version 1 alone must refuse
            raise UserError(f"{what}: version {file.version}, labels: {file.labels}: {cure}")
        self._check()

    def _check(self) -> None:
        """The parts of the file agree, and no name leads out of the folder."""
        cure = "pack the data anew (python -m data.pack) or fetch the right manifest.json"
        if self.kind == "text" and not self.text:
            raise UserError(f"{self.place}: kind is text, and the entry text is missing: {cure}")
        if sum(s.samples for s in self.shards) != self.samples:
            raise UserError(
                f"{self.place}: its shards do not add up to {self.samples} samples: {cure}"
            )
        if len(self.class_counts) != len(self.classes):
            raise UserError(f"{self.place}: class_counts and classes differ in length: {cure}")
        most = max(self.class_counts, default=0) if self.several else 0
        if max(self.labelled, most) > self.samples:
            raise UserError(f"{self.place}: class_counts add up to more than its samples: {cure}")
        if self.split not in SPLITS:
            raise UserError(f"{self.place}: split is {self.split!r}, none of {SPLITS}: {cure}")
        names = [self.members_file.file, *(s.name for s in self.shards)]
        for what, entries in (("class", self.classes), ("file", names)):
            if len(set(entries)) < len(entries):
                twice = Counter(entries).most_common(1)[0][0]
                raise UserError(f"{self.place}: the {what} {twice!r} stands there twice: {cure}")
        for name in names:
            if not is_address(name) and not is_plain(name):
                raise UserError(
                    f"{self.place}: {name!r} is neither a plain file name nor an address of"
                    f" {', '.join(SCHEMES)}: {cure}"
                )

    @classmethod
    def load(cls, root: str, cache_dir: str | None = None) -> "Manifest":
        """Reads the manifest of one split.

        Args:
            root: The split's folder, or its URL prefix (``http://host/cub/train``,
                ``pipe:ssh host cat /data/cub/train``).
            cache_dir: See `Manifest`.

        Returns:
            The manifest; its table of members is opened at first use.

        Raises:
            UserError: There is none, or it is broken.
        """
        root = str(root)
        place = join(root, FILE)
        if is_remote(root):
            from selfdistill.data.remote.cache import fetch_bytes

            return cls(fetch_bytes(place), root, cache_dir)
        if Path(root).is_file():
            raise UserError(f"{root} is a file: give the folder of the shards")
        try:
            content = files.read(Path(place), "check its permissions, or fetch it again")
        except FileNotFoundError:
            raise UserError(
                f"no {FILE} in {root}: pack the data first (python -m data.pack SOURCE SHARDS),"
                " or index tars made elsewhere (python -m data.index)"
            ) from None
        return cls(content, root, cache_dir)

    @classmethod
    def load_split(cls, data: str, split: str, cache_dir: str | None = None) -> "Manifest":
        """Reads the manifest of a split of a data set.

        Args:
            data: The data set's folder or URL prefix.
            split: "train", "val", "test" or "unlabelled".
            cache_dir: See `Manifest`.

        Returns:
            The manifest.

        Raises:
            UserError: The data set is missing, or has no such split, or another one in its place.
        """
        data = str(data)
        if not is_remote(data):
            if missing := no_set(data):
                raise UserError(missing)
            there = [s for s in SPLITS if (Path(data) / s / FILE).is_file()]
            if split not in there:
                has = f"it has {', '.join(there)}" if there else "it has no split with a manifest"
                option = "--unlabelled PATH" if split == UNLABELLED else f"--split {split}"
                raise UserError(
                    f"{data} has no split {split!r} ({has}): pack one into it"
                    f" (python -m data.pack SOURCE {data} {option})"
                )
        found = cls.load(join(data, split), cache_dir)
        if found.split != split:
            raise UserError(
                f"{found.root} holds the split {found.split!r}, not {split!r}: put each split into"
                " the folder of its name, or pack the data anew"
            )
        return found

    def shard_place(self, shard: int) -> str:
        """Path or URL of a shard."""
        name = self.shards[shard].name
        return name if is_remote(name) else join(self.root, name)

    @functools.cached_property
    def counts(self) -> NDArray[np.int64]:
        """int64 [S], samples in each shard."""
        return np.array([s.samples for s in self.shards], dtype=np.int64)

    def epoch(self, counts: NDArray[np.int64]) -> int:
        """How many samples are drawn in a pass, of shards with [S] of them."""
        return int(counts.sum())

    @functools.cached_property
    def starts(self) -> NDArray[np.int64]:
        """int64 [S + 1], the id of each shard's first sample, and N."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts)])

    @functools.cached_property
    def members(self) -> NDArray[np.int64]:
        """int64 [N, 4], memory-mapped: offset and length of input and label in the shard's tar.

        A sample without a label has -1, -1; one whose tar names its class has `IN_TABLE`, number.

        Raises:
            UserError: The table is missing, or is not the one that the manifest names.
        """
        with self.open_members() as file:
            return self.read_members(file)

    @property
    def sets(self) -> "list[Manifest]":
        """The sets of which this is made: itself, unless several are joined."""
        return [self]

    def open_members(self) -> BufferedReader:
        """The table's file.

        Raises:
            UserError: It is missing.
        """
        place = self.members_place
        if is_remote(self.root):
            from selfdistill.data.remote.cache import ShardCache

            # By its descriptor: another process may drop the file to make room for a shard.
            most = 4096 + 32 * self.samples  # npy's header, four numbers a sample
            cache = ShardCache(self.cache_dir, float("inf"))  # drops no shard
            return open(cache.open(place, self.members_file.sha256, None, most), "rb")
        try:
            return files.opened(Path(place), _CURE)
        except FileNotFoundError:
            raise UserError(f"{place} is missing beside {FILE}: {_CURE}") from None

    def read_members(self, file: BufferedReader, *, check: bool = True) -> NDArray[np.int64]:
        """`members` from their open file, which may have come from another process.

        Args:
            file: It may be closed then.
            check: The hash, where that is quick.

        Raises:
            UserError: It is not the table that the manifest names.
        """
        place = self.members_place
        table = records.mapped(file, np.int64, (self.samples, 4), _CURE, place)
        if check and os.fstat(file.fileno()).st_size <= _HASHED_BYTES:
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != self.members_file.sha256:
                raise UserError(
                    f"{place} is not the table that {self.place} names (its sha256 differs):"
                    f" {_CURE}"
                )
        self.__dict__["members"] = table
        return table

    def __getstate__(self) -> dict[str, Any]:
        """Without the table: pickled, a memory map would become an array of all samples."""
        return {k: v for k, v in self.__dict__.items() if k != "members"}


def write(
    folder: Path,
    *,
    split: str,
    classes: list[str],
    class_counts: list[int],
    shards: list[ShardInfo],
    members: NDArray[np.int64],
    kind: Literal["image", "text"] = "image",
    image: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    labelled: int | None = None,
) -> None:
    """Writes manifest.json and members.npy.

    Args:
        folder: The split's folder, which holds the shards.
        split: Its name.
        classes: Names of the classes.
        class_counts: Samples of each.
        shards: The tars in order.
        members: int64 [N, 4], see `Manifest.members`.
        kind: Kind of the inputs.
        image: What is known of the images, "size" among it (None where sizes differ).
        text: What is known of the texts, see `Manifest`; for kind "text" in place of `image`.
        labelled: Samples with a list of labels; None where each has one.
    """
    for shard in shards:
        if not is_plain(shard.name):
            raise UserError(f"{shard.name!r} is no name for a shard, see `is_plain`: rename it")
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(members, dtype=np.int64), allow_pickle=False)
    (folder / MEMBERS).write_bytes(buffer.getbuffer())
    content = {
        "format": FORMAT,
        "version": 1 if labelled is None else 2,
        "kind": kind,
        "split": split,
        "classes": classes,
        "class_counts": class_counts,
        **({} if labelled is None else {"labels": "several", "labelled": labelled}),
        "samples": len(members),
        kind: image if kind == "image" else text,
        "columns": ["input", "label"],
        "members": {
            "file": MEMBERS,
            "sha256": hashlib.sha256(buffer.getbuffer()).hexdigest(),
        },
        "shards": [s._asdict() for s in shards],
    }
    written = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (folder / FILE).write_text(written, encoding="utf-8")
    files.fsync(folder / MEMBERS, folder / FILE)
