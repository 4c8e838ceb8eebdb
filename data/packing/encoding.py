"""What the packer has to know of one kind of input: how a sample is stored, and what to note of it.

The other way, from what is stored to the tensors of a batch, is `data.loading.codec`.
"""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from selfdistill.data import files
from selfdistill.data.errors import UserError
from selfdistill.data.formats import channels, depth, dicom, fitting, images, texts
from selfdistill.data.sources.samples import Sample, Splits
from selfdistill.data.splits import Metric

# The size of the published ViT-MAE models.
DEFAULT_SIZE = 224

# A long paper has 10,000; models read 512 tokens.
MAX_WORDS = 20_000


def content_of(sample: Sample) -> bytes:
    """The sample's file.

    Raises:
        ValueError: It cannot be opened.
    """
    if isinstance(sample.source, Path):
        try:
            return files.read(sample.source, "give a regular file")
        except FileNotFoundError:
            raise ValueError("it is not there") from None
        except UserError as error:
            raise ValueError(f"it {str(error).removeprefix(f'{sample.source} ')}") from None
    if isinstance(sample.source, bytes):
        return sample.source
    assert not isinstance(sample.source, texts.Text)  # texts have no file of their own
    return sample.source()


def values_of(sample: Sample, chosen: channels.Channels | None = None) -> depth.Seen | None:
    """The values of a picture of more than 8 bits; None of others, and of unreadable ones."""
    try:
        return images.values(content_of(sample), chosen) if _may_be_deep(sample) else None
    except (ValueError, OSError):
        return None  # packing says what is wrong


def _may_be_deep(sample: Sample) -> bool:
    if not isinstance(sample.source, Path):
        return True
    try:
        with files.opened(sample.source, "give a regular file") as file:
            return depth.may_be_deep(file.read(depth.HEAD))
    except (OSError, UserError):
        return False


def choose_size(
    splits: Splits, span: depth.Range | None = None, chosen: channels.Channels | None = None
) -> int:
    """The side to fit images to when none is asked for.

    Args:
        splits: The samples.
        span: Range of more than 8 bits.
        chosen: Channels of TIFFs that have several.

    Returns:
        The images' own side where the first 64 of each split are squares of one size up to 224
        pixels; else 224, that of the published models.
    """
    side = 0
    for samples, _ in splits.values():
        for sample in itertools.islice(samples, 64):
            try:
                width, height = images.read(content_of(sample), None, span, chosen).size
            except ValueError:
                continue  # packing reports what cannot be read
            if width != height or width > DEFAULT_SIZE or side not in (0, width):
                return DEFAULT_SIZE
            side = width
    return side or DEFAULT_SIZE


class Kind(Protocol):
    """One kind of input, as it is packed.

    Attributes:
        name: As it stands in the manifest, and the word for one sample in messages.
        slow: Whether encoding one takes longer than handing it to a thread (30 us), outside of
            Python's lock.
    """

    name: ClassVar[Literal["image", "text"]]
    slow: ClassVar[bool]

    def encode(self, sample: Sample) -> tuple[str, bytes]:
        """Extension and bytes of the sample's member.

        Raises:
            ValueError: The sample is unreadable; one line that says how.
        """
        ...

    def entry(self) -> dict[str, Any]:
        """What the manifest notes of the inputs, under `name`."""
        ...

    def notes(self) -> list[str]:
        """What the user should know of the samples encoded so far, a line each."""
        ...


@dataclass(frozen=True)
class ImageModality:
    """Images.

    Attributes:
        size: In pixels, what images are fitted to; None keeps their own.
        keep_original: Store the files as they are.
        span: Range of more than 8 bits; None where there are no such pictures.
        chosen: Pages or channels of TIFFs that have several.
        unreadable: Those of which something beside the picture could not be read.
        how: How they are fitted.
        of_parts: Several launches pack them, so that none has looked for the set's range.
    """

    size: images.Size | None = DEFAULT_SIZE
    keep_original: bool = False
    span: depth.Range | None = None
    chosen: channels.Channels | None = None
    unreadable: list[str] = field(default_factory=list, compare=False)
    how: fitting.Fit = "crop"
    of_parts: bool = False
    name: ClassVar[Literal["image", "text"]] = "image"
    slow: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.size is not None and min(images.sides(self.size)) < 1:
            raise UserError(f"size is {images.typed(self.size)} pixels: give 1 or more")

    def encode(self, sample: Sample) -> tuple[str, bytes]:
        """See `Kind`; a PNG, or the file as it is."""
        content = content_of(sample)
        if self.of_parts and self.span is None and depth.may_be_deep(content[: depth.HEAD]):
            seen = images.values(content, self.chosen)
            if seen is not None and not seen.windows:
                raise UserError(
                    f"{sample.name} has more than 8 bits, as other pictures may, and no part sees"
                    " the values of all: give --range LOW,HIGH (0,65535 for the whole range)"
                )

        def on_unreadable() -> None:
            self.unreadable.append(sample.name)

        if not self.keep_original:
            chosen, how = self.chosen, self.how
            return "png", images.prepare(content, self.size, on_unreadable, self.span, chosen, how)
        if dicom.is_dicom(content):
            raise UserError(
                f"{sample.name} is DICOM, with the patient's data in it, and --keep_original would"
                " store them: leave the option out"
            )
        images.read(content, on_unreadable, self.span)  # only to see that it can be read
        if isinstance(sample.source, Path):
            return sample.source.suffix.lower().lstrip(".") or "img", content
        return suffix(content), content

    def entry(self) -> dict[str, Any]:
        """See `Kind`."""
        found: dict[str, Any] = {
            "size": None if self.keep_original else self.size,
            "stored": "original" if self.keep_original else "png",
            "fit": fitting.told(self.size, self.how, stored=self.keep_original),
        }
        return found | depth.entry(self.span)

    def notes(self) -> list[str]:
        """See `Kind`."""
        if not self.unreadable:
            return []
        return [
            f"note: {len(self.unreadable)} images have a profile, text or EXIF that cannot be read,"
            f" such as {min(self.unreadable)}: their pixels are whole, and are taken as they lie"
        ]


def suffix(content: bytes) -> str:
    """The extension of an image file that has no name."""
    return images.kind_of(content) or "img"


@dataclass(frozen=True)
class TextModality:
    """Texts.

    Attributes:
        stored: Extension of the members: "txt" for single texts, "json" where there are pairs.
        metric: How they are scored, where it is known.
        max_words: The longest text in words; a longer one is taken for many that lost their
            borders, of which a model would read the first few hundred tokens.
    """

    stored: texts.Stored = "txt"
    metric: Metric | None = None
    max_words: int = MAX_WORDS
    name: ClassVar[Literal["image", "text"]] = "text"
    slow: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.max_words < 1:
            raise UserError(f"max_words is {self.max_words}: give 1 or more")

    def encode(self, sample: Sample) -> tuple[str, bytes]:
        """See `Kind`; the text as it is."""
        if isinstance(sample.source, texts.Text):
            content = texts.store(*sample.source, self.stored)
        else:
            content = content_of(sample)
        found = texts.read(content, self.stored)
        words = max(len(part.split()) for part in (found.text, found.pair or ""))
        if words > self.max_words:
            raise ValueError(
                f"it has {words:,} words, of which a model reads the first few hundred tokens:"
                f" divide it into texts, or allow so many (--max_words {words})"
            )
        return self.stored, content

    def entry(self) -> dict[str, Any]:
        """See `Kind`."""
        found: dict[str, Any] = {"pairs": self.stored == "json", "stored": self.stored}
        return found if self.metric is None else found | {"metric": self.metric}

    def notes(self) -> list[str]:
        """See `Kind`."""
        return []
