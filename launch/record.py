"""The curves of a run: log.csv, and TensorBoard's scalars where tensorboard is installed."""

import csv
import math
from pathlib import Path

COLUMNS = ("step", "train_loss", "raw_loss", "ema_loss", "ema_distance")


def read(path: Path) -> list[dict[str, float]]:
    """The rows of a log.csv; a last line cut short by a kill is left out."""
    rows = []
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            if tuple(row) == COLUMNS and None not in row.values():
                rows.append({key: float(value) for key, value in row.items()})
    return rows


class Record:
    """Appends rows, on the one rank that has it; a resumed run begins with those up to its step."""

    def __init__(self, out: Path, resume: Path | None, step: int) -> None:
        out.mkdir(parents=True, exist_ok=True)
        before = resume.resolve().parent / "log.csv" if resume else None
        kept = read(before) if before is not None and before.is_file() else []
        kept = [row for row in kept if row["step"] <= step]
        fresh = out / ".log.csv"
        self.file = open(fresh, "w", newline="")  # noqa: SIM115 - open as long as the run
        self.writer = csv.writer(self.file)
        self.writer.writerow(COLUMNS)
        for row in kept:
            self.row(int(row["step"]), *(row[name] for name in COLUMNS[1:]))
        self.file.flush()
        fresh.replace(out / "log.csv")  # whole or not at all; the open file follows the rename
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.board = None
        else:
            self.board = SummaryWriter(out / "tensorboard", purge_step=step + 1)

    def row(self, step: int, *values: float) -> None:
        self.writer.writerow((step, *map(repr, values)))

    def add(
        self, step: int, train: float, raw: float, ema: float, distance: float = math.nan
    ) -> None:
        """Losses, and how far the average is from the weights, relative to them."""
        self.row(step, train, raw, ema, distance)
        self.file.flush()
        if self.board is not None:
            for name, value in (("train", train), ("raw", raw), ("ema", ema)):
                self.board.add_scalar(f"loss/{name}", value, step)
            self.board.add_scalar("ema/distance", distance, step)

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()
