"""Predictions in a file, written as they come."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
from lightning import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info

from ..atomic import atomic_path, csv_safe, disk_errors, temporary_path
from ..class_names import names_by_index
from ..errors import InputError, RunError

_ROWS = 2**12  # taken at a time when files are put together


class Predictions(Callback):
    """Writes what a module predicts, a row for each image, in the order of the data, on any number of devices.

    A row has the path of the image (its number, where the data are not in files) and each figure that ``predict_step``
    gives of it: of a :class:`~lsoftmax_lightning.ClassificationModule` ``prediction``, by the name of the class,
    ``probability``, and ``angle`` to the weight of that class in degrees. Each process writes the rows of its images
    batch by batch to a file beside the output; at the end the first process puts these together. They have to share the
    folder, and nothing is held in memory but a batch. Call ``trainer.predict`` with ``return_predictions=False``, or
    Lightning holds all of them.

    The output appears when it is complete. What a killed prediction leaves beside it is removed by the next one. In
    CSV, texts that a spreadsheet would run as a formula have a ``'`` in front (``atomic.csv_safe``).

    Args:
        output: File to write, ``.csv`` or ``.parquet``; by default ``predictions.csv`` in the folder of the run.
        embeddings: Whether to write the embeddings beside it as ``.npy``, float32 [N, D], in the same order.

    Raises:
        InputError: When the Trainer starts, if a file cannot be written so.
        RunError: If the disk is full, or the folder is read-only.
    """

    def __init__(self, output: str | None = None, embeddings: bool = False) -> None:
        if output is not None and Path(output).suffix not in (".csv", ".parquet"):
            raise InputError(f"predictions are written as .csv or .parquet, got {output}.")
        self.output, self.embeddings = output, embeddings
        self._parts = ExitStack()  # the files of this process, which it removes when it is closed

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Finds the place."""
        if stage != "predict":
            return
        folder = trainer.log_dir if trainer.loggers else None  # to be asked on every process
        if self.output is None and folder is None:
            raise InputError("without a logger there is no folder of the run: name a file for the predictions.")
        self._path = Path(self.output or Path(str(folder), "predictions.csv"))
        if self._path.suffix == ".parquet" and not find_spec("pyarrow"):
            raise InputError("to write .parquet takes pyarrow: pip install 'lsoftmax-lightning[parquet]'.")
        with self._disk_errors():
            self._path.parent.mkdir(parents=True, exist_ok=True)

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Opens the files of this process."""
        data = getattr(trainer.datamodule, "predict_data", None)  # type: ignore[attr-defined]
        self._paths = getattr(getattr(data, "images", None), "paths", ())
        self._names = names_by_index(trainer.datamodule)  # type: ignore[attr-defined]
        self._count, self._columns, self._width = 0, {"path" if self._paths else "index": not self._paths}, 0
        with self._disk_errors():
            paths = [self._path, self._embeddings_path] if self.embeddings else [self._path]
            table, *arrays = [self._parts.enter_context(temporary_path(path)) for path in paths]
            self._part_names = [str(part) for part in (table, *arrays)]
            self._table: TextIO = self._parts.enter_context(table.open("w", newline="", encoding="utf-8"))
            self._array: BinaryIO | None = self._parts.enter_context(arrays[0].open("wb")) if arrays else None
        self._writer = csv.writer(self._table)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Writes the rows of a batch."""
        if not isinstance(outputs, dict):
            raise InputError(
                f"Predictions takes a dict of tensors from predict_step; {type(pl_module).__name__} gives "
                f"{type(outputs).__name__}."
            )
        figures = {name: value if value.is_floating_point() else value.long() for name, value in outputs.items()}
        figures = {name: value.tolist() for name, value in figures.items() if value.ndim == 1}
        if not figures and not self.embeddings:
            raise InputError(
                f"{type(pl_module).__name__} predicts embeddings alone: ask for them by embeddings=true, on the "
                "command line --predictions.embeddings true."
            )
        if self._names and "prediction" in figures:
            figures["prediction"] = [self._names.get(index, str(index)) for index in figures["prediction"]]
        size = len(next(iter(outputs.values())))
        numbers = [trainer.global_rank + trainer.world_size * (self._count + i) for i in range(size)]
        self._count += size
        self._columns |= {name: not outputs[name].is_floating_point() for name in figures}
        first = [self._paths[number] for number in numbers] if self._paths else numbers
        with self._disk_errors():
            for row in zip(first, *figures.values(), strict=True):
                self._writer.writerow([f"{value:.6f}" if isinstance(value, float) else value for value in row])
        if self._array is not None:
            if "embedding" not in outputs:
                raise InputError(f"predict_step of {type(pl_module).__name__} gives no embedding to write.")
            embedding = outputs["embedding"].float().cpu().numpy()
            self._width = embedding.shape[1]
            with self._disk_errors():
                self._array.write(np.ascontiguousarray(embedding).data)  # tofile hides the cause of an error

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Puts the files of all processes together."""
        with self._disk_errors():
            self._table.close()
            if self._array is not None:
                self._array.close()
        # of each kind, the files of all processes; their names hold hosts and process ids
        names = [trainer.strategy.broadcast(self._part_names, src=rank) for rank in range(trainer.world_size)]
        rows, *embeddings = [[Path(name) for name in kind] for kind in zip(*names, strict=True)]
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            with self._disk_errors(), ExitStack() as complete:
                self._write_rows(rows, complete.enter_context(atomic_path(self._path)))
                if embeddings:
                    self._write_embeddings(embeddings[0], complete.enter_context(atomic_path(self._embeddings_path)))
            rank_zero_info(f"The predictions are in {self._path}")
        trainer.strategy.barrier()
        self._parts.close()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leaves no part of this process."""
        with suppress(OSError):  # of a full disk, on which a file that is closed cannot be written
            self._parts.close()

    @property
    def _embeddings_path(self) -> Path:
        return self._path.with_suffix(".npy")

    def _disk_errors(self) -> AbstractContextManager[None]:
        return disk_errors("predictions.output", self._path)

    def _write_rows(self, parts: list[Path], whole: Path) -> None:
        if self._path.suffix == ".parquet":
            self._write_parquet(parts, whole)
            return
        with whole.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(csv_safe(self._columns))
            writer.writerows(map(csv_safe, _in_turn(parts)))

    def _write_parquet(self, parts: list[Path], whole: Path) -> None:
        import pyarrow
        from pyarrow.parquet import ParquetWriter

        rows = _in_turn(parts)
        words = ("path", "prediction") if self._names else ("path",)
        kind = {
            name: pyarrow.string() if name in words else pyarrow.int64() if whole_numbers else pyarrow.float32()
            for name, whole_numbers in self._columns.items()
        }
        with ParquetWriter(whole, pyarrow.schema(kind)) as writer:
            while chunk := list(itertools.islice(rows, _ROWS)):
                columns = zip(kind.items(), zip(*chunk, strict=True), strict=True)
                writer.write_table(
                    pyarrow.table({name: pyarrow.array(column).cast(type_) for (name, type_), column in columns})
                )

    def _write_embeddings(self, parts: list[Path], whole: Path) -> None:
        count = sum(part.stat().st_size for part in parts) // (4 * self._width)
        kind = {"descr": "<f4", "fortran_order": False, "shape": (count, self._width)}
        with ExitStack() as stack:
            file, *files = (
                stack.enter_context(path.open(mode))
                for path, mode in ((whole, "wb"), *((part, "rb") for part in parts))
            )
            np.lib.format.write_array_header_1_0(file, kind)
            while True:
                each = [np.fromfile(own, "<f4", _ROWS * self._width).reshape(-1, self._width) for own in files]
                block = np.empty((sum(map(len, each)), self._width), "<f4")
                if not len(block):
                    return
                for rank, rows in enumerate(each):
                    block[rank :: len(each)] = rows
                file.write(block.data)


def _in_turn(parts: list[Path]) -> Iterator[list[str]]:
    """The rows of the whole, of which the n-th is the next one of process n modulo the number of processes."""
    with ExitStack() as stack:
        readers = [csv.reader(stack.enter_context(part.open(newline="", encoding="utf-8"))) for part in parts]
        for reader in itertools.cycle(readers):
            row = next(reader, None)
            if row is None:
                break
            yield row
        if any(next(reader, None) for reader in readers):
            raise RunError("the processes predicted different numbers of images: their order is not known.")
