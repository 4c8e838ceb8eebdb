"""Step 3, bytes -> tensors: decodes a sample, and collates the samples of a batch."""

import math
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from selfdistill.data.errors import BrokenData, UserError
from selfdistill.data.formats import images
from selfdistill.data.formats.channels import Channels
from selfdistill.data.formats.depth import Range
from selfdistill.data.formats.fitting import Fit


class Codec(Protocol):
    """Decodes samples in a loader's workers, and puts them together.

    Attributes:
        noted: Names of samples that were decoded though something beside the input is unreadable.
    """

    noted: list[str]

    def decode(self, content: bytes, name: str) -> NDArray[Any]:
        """One sample's array.

        Args:
            content: The input member as it is stored.
            name: Of the sample, for messages.

        Raises:
            BrokenData: The content is not of this kind.
        """
        ...

    def blank(self, like: NDArray[Any] | None) -> NDArray[Any] | None:
        """The array of a padding row; None if it cannot be told without another sample.

        Args:
            like: A sample of the same batch, if there is any.
        """
        ...

    def nbytes(self, rows: int) -> int | None:
        """Memory of a batch of so many samples at most, in bytes; None where that is not known."""
        ...

    def collate(
        self, arrays: list[NDArray[Any]], names: list[str], room: NDArray[np.uint8] | None = None
    ) -> dict[str, torch.Tensor]:
        """The tensors of a batch of b samples, each with b rows.

        Args:
            arrays: What `decode` and `blank` gave.
            names: Of the samples, for messages.
            room: Memory that may be taken for the largest of them, if it is enough.

        Raises:
            UserError: They do not fit together.
        """
        ...


class Images:
    """Images as uint8 [b, 3, H, W] under the name `images`.

    Args:
        size: In pixels, to which images of another size are fitted; None leaves them, and then
            those of a batch must be of one size.
        span: Range of pictures of more than 8 bits, as the manifest has it.
        how: How they are fitted, as the manifest has it.
    """

    def __init__(
        self, size: images.Size | None = None, span: Range | None = None, how: Fit = "crop"
    ) -> None:
        self.size, self.span, self.how = size, span, how
        self.noted: list[str] = []

    def decode(self, content: bytes, name: str) -> NDArray[Any]:
        """See `Codec`; uint8 [3, H, W]."""
        return images.decode(
            content, self.size, name, lambda: self.noted.append(name), self.span, self.how
        )

    def blank(self, like: NDArray[Any] | None) -> NDArray[Any] | None:
        """See `Codec`; black."""
        if like is not None:
            return np.zeros_like(like)
        return None if self.size is None else np.zeros((3, *images.sides(self.size)), np.uint8)

    def nbytes(self, rows: int) -> int | None:
        """See `Codec`."""
        return None if self.size is None else rows * 3 * math.prod(images.sides(self.size))

    def collate(
        self, arrays: list[NDArray[Any]], names: list[str], room: NDArray[np.uint8] | None = None
    ) -> dict[str, torch.Tensor]:
        """See `Codec`."""
        first, size = arrays[0].shape, len(arrays) * arrays[0].size
        if room is None or room.size < size:
            room = np.empty(size, dtype=np.uint8)
        out = room[:size].reshape(len(arrays), *first)
        for row, array, name in zip(out, arrays, names, strict=True):
            if array.shape != first:
                raise UserError(
                    f"{name} has {array.shape[2]}x{array.shape[1]} pixels, {names[0]}"
                    f" {first[2]}x{first[1]}: give the size to fit them to, or pack with --size"
                )
            row[:] = array
        return {"images": torch.from_numpy(out)}


class Pictures(Images):
    """Picture files as people have them, decoded to what packing and training made of theirs.

    Packing decodes the whole of a JPEG before it fits it to a size; a loader of files that were
    packed as they are (--keep_original) decodes no more of it than that size needs.

    Args:
        size: See `Images`.
        span: See `Images`.
        chosen: Pages or channels of TIFFs that have several, see `data.formats.channels`.
        whole: As packing does.
        how: See `Images`.
    """

    def __init__(
        self,
        size: images.Size | None,
        span: Range | None = None,
        chosen: Channels | None = None,
        *,
        whole: bool = True,
        how: Fit = "crop",
    ) -> None:
        super().__init__(size, span, how)
        self.chosen, self.whole = chosen, whole

    def decode(self, content: bytes, name: str) -> NDArray[Any]:
        """See `Codec`; the error says what is wrong alone."""

        def noted() -> None:
            self.noted.append(name)

        try:
            if self.span is None:
                self._refuse_dark(content)
            return images.pixels(
                content, self.size, noted, self.span, self.chosen, self.whole, self.how
            )
        except ValueError as error:
            raise BrokenData(str(error)) from None

    def _refuse_dark(self, content: bytes) -> None:
        """Refuses a picture of more than 8 bits that would come out nearly black.

        Packing looks for the range of a set; of one picture nobody can tell it.
        """
        if content.startswith(b"\xff\xd8"):  # a JPEG has 8 bits
            return
        seen = images.values(content, self.chosen)
        if seen and seen.whole and not seen.windows and 0 <= seen.low < seen.high < 2**15:
            raise ValueError(
                f"it has values of {seen.low:.10g} to {seen.high:.10g} of 16 bits, and the model"
                " was not trained on such: give their range (--range LOW,HIGH)"
            )
