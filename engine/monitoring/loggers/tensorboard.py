"""TensorBoard's event files, in the stage's folder."""

from __future__ import annotations

from collections.abc import Mapping

from selfdistill.engine.monitoring.loggers.base import Flat, Picture, Place


class TensorBoard:
    """See `Logger`."""

    def __init__(self, place: Place) -> None:
        # Here, since it takes a second to import and the other ranks have no use for it.
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard drops all that earlier event files of the folder hold from this step on.
        self.writer = SummaryWriter(str(place.folder), purge_step=place.first)
        self.latest: dict[str, int] = {}  # tag -> last step

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)
            self.latest[tag] = step
        self.writer.flush()

    def image(self, step: int, tag: str, picture: Picture) -> None:
        """See `Logger`."""
        self.writer.add_image(tag, picture, step)
        self.writer.flush()

    def text(self, step: int, tag: str, markdown: str) -> None:
        """See `Logger`."""
        self.writer.add_text(tag, markdown, step)
        self.writer.flush()

    def hparams(self, step: int, config: Flat, metrics: Mapping[str, float]) -> None:
        """See `Logger`: fills the HParams tab.

        `SummaryWriter.add_hparams` writes into a sub-run named by the time, and with it an
        "experiment" record. TensorBoard takes the first such record that it finds for the columns
        of all runs, so that other stages' options vanish; without one it forms the union.
        """
        from torch.utils.tensorboard.summary import hparams

        _, begin, end = hparams(dict(config), dict(metrics))
        writer = self.writer._get_file_writer()
        for summary in (begin, end):
            writer.add_summary(summary, step)
        for tag, value in metrics.items():
            if self.latest.get(tag) != step:  # the tab shows scalars; logged ones are there
                self.writer.add_scalar(tag, value, step)
        self.writer.flush()

    def close(self) -> None:
        """See `Logger`."""
        self.writer.close()
