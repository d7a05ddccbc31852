"""The curves of a run: log.csv, and TensorBoard's scalars where tensorboard is installed."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

COLUMNS = ("step", "train_loss", "raw_loss", "ema_loss", "ema_distance")  # then watched averages


def read(path: Path) -> list[dict[str, float]]:
    """The rows of a log.csv, without empty cells; a last line cut short by a kill is left out."""
    rows = []
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            if tuple(row)[: len(COLUMNS)] == COLUMNS and None not in row.values():
                rows.append({key: float(value) for key, value in row.items() if value})
    return rows


def watched(path: Path) -> list[str]:
    """Names of the averages that a log.csv has beside the first."""
    with open(path, newline="") as file:
        header = next(csv.reader(file), [])
    return [column.removesuffix("_loss") for column in header[len(COLUMNS) :]]


class Record:
    """Appends rows, on the one rank that has it; a resumed run begins with those up to its step."""

    def __init__(
        self, out: Path, resume: Path | None, step: int, watched: Sequence[str] = ()
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        before = resume.resolve().parent / "log.csv" if resume else None
        kept = read(before) if before is not None and before.is_file() else []
        kept = [row for row in kept if row["step"] <= step]
        self.columns = (*COLUMNS, *(f"{name}_loss" for name in watched))
        fresh = out / ".log.csv"
        self.file = open(fresh, "w", newline="")  # noqa: SIM115 - open as long as the run
        self.writer = csv.writer(self.file)
        self.writer.writerow(self.columns)
        for row in kept:
            self.row(row)
        self.file.flush()
        fresh.replace(out / "log.csv")  # whole or not at all; the open file follows the rename
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.board = None
        else:
            self.board = SummaryWriter(out / "tensorboard", purge_step=step + 1)

    def row(self, values: Mapping[str, float]) -> None:
        """Writes values by column; those that are not there as empty cells."""
        cells = [repr(values[name]) if name in values else "" for name in self.columns[1:]]
        self.writer.writerow((int(values["step"]), *cells))

    def add(self, step: int, *, distance: float = math.nan, **losses: float) -> None:
        """Losses, and how far the average is from the weights, relative to them."""
        values = {f"{name}_loss": value for name, value in losses.items()}
        self.row({"step": step, "ema_distance": distance, **values})
        self.file.flush()
        if self.board is not None:
            for name, value in losses.items():
                self.board.add_scalar(f"loss/{name}", value, step)
            self.board.add_scalar("ema/distance", distance, step)

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()
