"""What a run writes besides its weights: `metrics.csv`, sample grids, `loss.png`, and TensorBoard events if asked."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from images.pictures import save_grid, save_loss_curves
from runtime.errors import UserError, reason
from runtime.files import atomic_path, errors_named

COLUMNS: tuple[str, ...] = ("step", "images", "seconds", "loss", "lr", "held_out_loss")


def tensorboard_writer() -> type:
    """TensorBoard's SummaryWriter. Raises UserError if tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: needs tensorboard; pip install -r requirements-compare.txt") from None
    return SummaryWriter


class RunLog:
    """The records of the run in `folder`; `close` it at the end.

    step: where the run starts or goes on. Rows of `metrics.csv` after it are dropped, since those steps are repeated.
    """

    def __init__(self, folder: Path, *, step: int = 0, tensorboard: bool = False):
        self.folder = folder
        self.metrics = folder / "metrics.csv"
        kept = _complete_rows(self.metrics, step) if self.metrics.exists() else []
        with atomic_path(self.metrics) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
        self.file = open(self.metrics, "a", newline="")  # noqa: SIM115 - until close()
        self.writer = csv.DictWriter(self.file, COLUMNS, lineterminator="\n")
        self.events = tensorboard_writer()(folder, purge_step=step + 1) if tensorboard else None

    def row(self, step: int, **values: float) -> None:
        """Write one line of `metrics.csv`; a column that is not given stays empty."""
        with errors_named(self.metrics):
            self.writer.writerow({"step": step} | {name: f"{value:.8g}" for name, value in values.items()})
            self.file.flush()
        if self.events is not None:
            for name in values.keys() & {"loss", "lr", "held_out_loss"}:
                self.events.add_scalar(name, values[name], step)

    def flush(self) -> None:
        """Make sure that all rows are on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def grid(self, step: int, images: Tensor, columns: Sequence[str]) -> None:
        """Write sampled images (N, C, H, W) in [-1, 1] as a PNG, with the names of its columns, if it has some."""
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        save_grid(images, folder / f"step_{step:07d}.png", columns)

    def curves(self) -> None:
        """Plot all rows so far as `loss.png`."""
        save_loss_curves(self.metrics, self.folder / "loss.png")

    def close(self) -> None:
        """Close the files."""
        with errors_named(self.metrics):
            self.file.close()  # closing tries once more to write what could not be written
        if self.events is not None:
            self.events.close()


def _complete_rows(metrics: Path, last: int) -> list[dict[str, str]]:
    """The rows up to step `last`, without a last line that a killed run did not finish."""
    try:
        *lines, _ = metrics.read_text(encoding="utf-8").split("\n")
        rows = list(csv.DictReader(lines))
        if any(row.keys() != set(COLUMNS) or None in row.values() for row in rows):
            raise ValueError("a line has other columns")
        return [row for row in rows if int(row["step"]) <= last]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{metrics}: not the metrics of a run ({reason(error)}); move it away to start a new one"
        ) from error
