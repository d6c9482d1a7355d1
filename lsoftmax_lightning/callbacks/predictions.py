"""Predictions in a file, written batch by batch."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ..atomic import atomic_path, csv_safe, disk_errors, temporary_path
from ..checkpoints import read
from ..class_names import names_by_index
from ..compat import current_datamodule
from ..errors import InputError, RunError
from ..metrics import ANGLE_COUNTS, angle_quantile

MERGED_ROWS = 2**12  # rows in memory when the files of the ranks are merged


class Predictions(Callback):
    """Write the predictions of a module to a file, one row per image, in the order of the data.

    The first column is the path of the image, or its index if the data are not in files. The other columns are the 1-D
    outputs of ``predict_step``, which must be the same in every batch. For a
    :class:`~lsoftmax_lightning.ClassificationModule` they are ``prediction`` (the name of the class), ``probability``,
    and ``angle`` to the weight of that class in degrees; the true class, if ``predict_data.targets`` of the datamodule
    has it, is in front as ``label``.
    Floats are written with nine digits, which is exact for float32.

    Each rank writes its rows batch by batch to a temporary file beside the output, and rank 0 merges the files at the
    end. The ranks must share the folder. Only one batch is in memory if ``trainer.predict`` is called with
    ``return_predictions=False``.

    The output appears when it is complete. If an error ends the prediction of a single rank, the rows before it are in
    ``<name>.incomplete.<suffix>``. The next prediction removes the temporary files of a killed one. In CSV, strings
    that a spreadsheet would run as a formula have a ``'`` in front (``atomic.csv_safe``).

    Args:
        output: File to write, ``.csv`` or ``.parquet``. Default: ``predictions.csv`` in the folder of the run.
        embeddings: Whether to write the embeddings beside it as ``.npy``, float32 (N, D), in the same order.
        top_k: Number of classes in a row, as ``prediction_2``, ``probability_2`` and so on. Default: 1.
        max_angle: Angle in degrees to the predicted class above which the ``prediction`` is ``unknown``. Default: none.
        max_angle_quantile: Fraction of the validation images that ``max_angle`` keeps, 0.95 for example. It is taken
            from the angles in the checkpoint, which :class:`~lsoftmax_lightning.callbacks.MarginMonitor` saves.
            Default: none.

    Raises:
        InputError: If an argument is wrong for the module, ``predict_step`` returns anything else, there are several
            dataloaders, or a package is missing.
        RunError: If the disk is full, or the folder is read-only or not shared by all ranks.
    """

    def __init__(
        self,
        output: str | None = None,
        embeddings: bool = False,
        top_k: int = 1,
        max_angle: float | None = None,
        max_angle_quantile: float | None = None,
    ) -> None:
        if output is not None and Path(output).suffix not in (".csv", ".parquet"):
            raise InputError(f"predictions.output: must end in .csv or .parquet, got {output}; choose another name.")
        if top_k < 1:
            raise InputError(f"predictions.top_k: must be 1 or more, got {top_k}; leave it out for one class.")
        if max_angle is not None and not 0 < max_angle <= 180:
            raise InputError(f"predictions.max_angle: must be above 0 and at most 180 degrees, got {max_angle}.")
        if max_angle_quantile is not None and not 0 < max_angle_quantile <= 1:
            raise InputError(
                f"predictions.max_angle_quantile: must be above 0 and at most 1, got {max_angle_quantile}; 0.95 keeps "
                "the classes of 95 % of the validation images."
            )
        if max_angle is not None and max_angle_quantile is not None:
            raise InputError(
                f"predictions.max_angle: is determined by max_angle_quantile, got {max_angle} too; leave one out."
            )
        self.output, self.embeddings, self.top_k, self.max_angle = output, embeddings, top_k, max_angle
        self.max_angle_quantile = max_angle_quantile
        self._count = 0  # rows written by this rank
        self._temporary_files = ExitStack()  # the files of this rank; closing it removes them

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Determine the path of the output and create its folder."""
        if stage != "predict":
            return
        folder = trainer.log_dir if trainer.loggers else None  # a collective: every rank must read it
        if self.output is None and folder is None:
            raise InputError(
                "predictions.output: without a logger there is no folder of the run, and fast_dev_run disables all "
                "loggers, got None; name a file."
            )
        self._path = Path(self.output or Path(str(folder), "predictions.csv"))
        if self._path.suffix == ".parquet" and not find_spec("pyarrow"):
            raise InputError(
                f"predictions.output: .parquet requires pyarrow, which is not installed, got {self._path}; pip install "
                "'lsoftmax-lightning[parquet]'."
            )
        if self._path.is_dir():
            raise InputError(f"predictions.output: must be a file, got the folder {self._path}; name a file in it.")
        with self._disk_errors():
            self._path.parent.mkdir(parents=True, exist_ok=True)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the temporary files of this rank."""
        if len(trainer.num_predict_batches) > 1:
            raise InputError(
                f"predictions: need a single dataloader, got {len(trainer.num_predict_batches)}; predict with each in "
                "a call of its own."
            )
        if hasattr(pl_module, "top_k"):
            self._module_top_k = pl_module.top_k
            pl_module.top_k = self.top_k  # type: ignore[assignment]
        elif self.top_k > 1 or self.max_angle is not None or self.max_angle_quantile is not None:
            raise InputError(
                f"predictions.top_k and max_angle: need a ClassificationModule, got {type(pl_module).__name__}; leave "
                "them out."
            )
        if self.max_angle_quantile is not None:
            self.max_angle = _validation_quantile(trainer.ckpt_path, self.max_angle_quantile)
            rank_zero_info(
                f"Images more than {self.max_angle:.1f} degrees from the predicted class are unknown: "
                f"{self.max_angle_quantile:.4g} of the validation images are within."
            )
        datamodule = current_datamodule(trainer)
        data = getattr(datamodule, "predict_data", None)
        self._has_images = data is not None  # in batches, whose order is that of the data
        self._paths = getattr(getattr(data, "images", None), "paths", ())
        targets = getattr(data, "targets", None)
        self._targets = targets if isinstance(targets, Tensor) and not (targets < 0).any() else None  # -1 is unknown
        self._id_column = "path" if self._paths else "index"
        spec = getattr(pl_module, "data_spec", None)  # of the training data
        self._class_names = names_by_index(datamodule) or names_by_index(spec)
        self._count = 0  # rows written by this rank
        self._is_integer: dict[str, bool] = {}  # by output, in the order of the columns
        self._embedding_dim = 0
        with self._disk_errors():
            paths = [self._path, self._embeddings_path] if self.embeddings else [self._path]
            files = self._temporary_files
            table, *embeddings = [files.enter_context(temporary_path(path)) for path in paths]
            self._temporary_names = [str(path) for path in (table, *embeddings)]
            self._table_file: TextIO = files.enter_context(table.open("w", newline="", encoding="utf-8"))
            self._embedding_file: BinaryIO | None = (
                files.enter_context(embeddings[0].open("wb")) if embeddings else None
            )
        self._writer = csv.writer(self._table_file)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the rows of a batch."""
        module_name = type(pl_module).__name__
        _check_outputs(outputs, module_name)
        size = len(next(iter(outputs.values())))
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        if self._has_images and len(images) != size:
            raise InputError(
                f"predict_step: {module_name} must return tensors with a row for each image of the batch, got {size} "
                f"rows for {len(images)} images; mark images in an output instead of leaving them out."
            )
        indices = [trainer.global_rank + trainer.world_size * (self._count + i) for i in range(size)]
        if self._targets is not None and "prediction" in outputs:
            outputs = {"label": self._targets[indices], **outputs}
        is_integer = {name: not value.is_floating_point() for name, value in outputs.items() if value.ndim == 1}
        if not is_integer and not self.embeddings:
            raise InputError(
                f"predictions.embeddings: must be true for {module_name}, which predicts only embeddings, got false; "
                "set --predictions.embeddings true (in Python, embeddings=True)."
            )
        if not self._count:
            self._is_integer = is_integer
        if is_integer != self._is_integer:
            raise InputError(
                f"predict_step: {module_name} must return the same 1-D outputs in every batch, and each either as "
                f"integers or as floats, got {_types(is_integer)} after {_types(self._is_integer)}."
            )
        columns = {
            name: (outputs[name].long() if integer else outputs[name]).tolist()
            for name, integer in self._is_integer.items()
        }
        for name in columns.keys() & self._class_columns:
            columns[name] = [self._class_names.get(index, str(index)) for index in columns[name]]
        if self.max_angle is not None:
            if missing := {"prediction", "angle"} - columns.keys():
                raise InputError(
                    f"predictions.max_angle: needs `{min(missing)}` from predict_step of {module_name}, got only "
                    f"{', '.join(outputs)}; return it, or leave max_angle out."
                )
            pairs = zip(columns["prediction"], columns["angle"], strict=True)
            columns["prediction"] = [name if angle <= self.max_angle else "unknown" for name, angle in pairs]
        image_ids = [self._paths[index] for index in indices] if self._paths else indices
        with self._disk_errors():
            for row in zip(image_ids, *columns.values(), strict=True):
                self._writer.writerow([f"{value:.9g}" if isinstance(value, float) else value for value in row])
        if self._embedding_file is not None:
            if "embedding" not in outputs:
                raise InputError(
                    f"predictions.embeddings: needs `embedding` from predict_step of {module_name}, got only "
                    f"{', '.join(outputs)}; return it, or set embeddings to false."
                )
            embedding = outputs["embedding"].float().cpu().numpy()
            if embedding.ndim != 2 or (self._count and embedding.shape[1] != self._embedding_dim):
                raise InputError(
                    f"predict_step: {module_name} must return `embedding` as (N, D), with the same D in every batch, "
                    f"got {embedding.shape}."
                )
            self._embedding_dim = embedding.shape[1]
            with self._disk_errors():
                self._embedding_file.write(np.ascontiguousarray(embedding).data)  # tofile hides the cause of an error
        self._count += size

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the files of all ranks."""
        with self._disk_errors():
            self._table_file.close()
            if self._embedding_file is not None:
                self._embedding_file.close()
        # the names contain host names and process ids, so each rank must send its own
        names = [trainer.strategy.broadcast(self._temporary_names, src=rank) for rank in range(trainer.world_size)]
        tables, *embeddings = [[Path(name) for name in rank_names] for rank_names in zip(*names, strict=True)]
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            if missing := [name for rank_names in names for name in rank_names if not Path(name).is_file()]:
                raise RunError(
                    f"predictions.output: all ranks must share the folder of {self._path}, got no {missing[0]} of "
                    "another rank; choose a folder on a shared disk."
                )
            with self._disk_errors(), ExitStack() as complete:
                self._merge_tables(tables, complete.enter_context(atomic_path(self._path)))
                if embeddings:
                    self._merge_embeddings(embeddings[0], complete.enter_context(atomic_path(self._embeddings_path)))
            rank_zero_info(f"The predictions are in {self._path}")
        trainer.strategy.barrier()
        self._temporary_files.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore ``top_k`` of the module."""
        if hasattr(self, "_module_top_k"):
            pl_module.top_k = self._module_top_k
            del self._module_top_k

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the rows of a single rank; remove the temporary files."""
        with suppress(OSError):  # closing a file writes its buffer, which fails on a full disk
            is_kept = isinstance(exception, Exception) and not isinstance(exception, RunError)  # no signal or full disk
            if is_kept and trainer.world_size == 1 and self._count and not self._table_file.closed:
                self._table_file.close()
                path = self._path.with_name(f"{self._path.stem}.incomplete{self._path.suffix}")
                with atomic_path(path) as part:
                    self._merge_tables([Path(self._temporary_names[0])], part)
                rank_zero_info(f"The predictions before the error are in {path}")
        with suppress(OSError):
            self._temporary_files.close()

    @property
    def _class_columns(self) -> set[str]:
        """Columns of class names."""
        further = {f"prediction_{k}" for k in range(2, self.top_k + 1)}
        return {"label", "prediction", *further} if self._class_names else set()

    @property
    def _embeddings_path(self) -> Path:
        return self._path.with_suffix(".npy")

    def _disk_errors(self) -> AbstractContextManager[None]:
        return disk_errors("predictions.output", self._path)

    def _merge_tables(self, rank_files: list[Path], path: Path) -> None:
        if self._path.suffix == ".parquet":
            self._write_parquet(rank_files, path)
            return
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(csv_safe([self._id_column, *self._is_integer]))
            writer.writerows(map(csv_safe, _interleaved_rows(rank_files)))

    def _write_parquet(self, rank_files: list[Path], path: Path) -> None:
        import pyarrow
        from pyarrow.parquet import ParquetWriter

        rows = _interleaved_rows(rank_files)
        strings = {"path", *self._class_columns}
        if self.max_angle is not None:
            strings.add("prediction")
        types = {
            name: pyarrow.string() if name in strings else pyarrow.int64() if is_integer else pyarrow.float32()
            for name, is_integer in {self._id_column: True, **self._is_integer}.items()
        }
        with ParquetWriter(path, pyarrow.schema(types)) as writer:
            while chunk := list(itertools.islice(rows, MERGED_ROWS)):
                columns = zip(types.items(), zip(*chunk, strict=True), strict=True)
                writer.write_table(
                    pyarrow.table({name: pyarrow.array(column).cast(type_) for (name, type_), column in columns})
                )

    def _merge_embeddings(self, rank_files: list[Path], path: Path) -> None:
        count = sum(file.stat().st_size for file in rank_files) // (4 * self._embedding_dim)
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, self._embedding_dim)}
        with ExitStack() as stack:
            files = [stack.enter_context(rank_file.open("rb")) for rank_file in rank_files]
            output = stack.enter_context(path.open("wb"))
            np.lib.format.write_array_header_1_0(output, header)
            while True:
                shards = [
                    np.fromfile(file, "<f4", MERGED_ROWS * self._embedding_dim).reshape(-1, self._embedding_dim)
                    for file in files
                ]
                block = np.empty((sum(map(len, shards)), self._embedding_dim), "<f4")
                if not len(block):
                    return
                for rank, shard in enumerate(shards):
                    block[rank :: len(shards)] = shard
                output.write(block.data)


def _check_outputs(outputs: Any, module_name: str) -> None:
    """Check that ``predict_step`` returned a dict of tensors with a row for each image."""
    types = {name: type(value).__name__ for name, value in outputs.items()} if isinstance(outputs, dict) else {}
    if not types or not all(isinstance(value, Tensor) for value in outputs.values()):
        raise InputError(
            f"predict_step: {module_name} must return a dict of tensors, got {types or type(outputs).__name__}; "
            "override predict_step."
        )
    shapes = {name: tuple(value.shape) for name, value in outputs.items()}
    if () in shapes.values() or len({shape[0] for shape in shapes.values()}) > 1:
        raise InputError(
            f"predict_step: {module_name} must return tensors with a row for each image of the batch, got the shapes "
            f"{shapes}; leave out the others."
        )
    if reserved := {"index", "path"} & outputs.keys():
        raise InputError(
            f"predict_step: {module_name} must not return `{min(reserved)}`, the name of the first column, got "
            f"{', '.join(outputs)}; rename it."
        )


def _validation_quantile(ckpt_path: str | Path | None, q: float) -> float:
    """Return the angle in degrees within which a fraction of the validation images of a checkpoint are."""
    counts = read(ckpt_path).get(ANGLE_COUNTS) if ckpt_path else None
    if counts is None or not counts.any():
        raise InputError(
            f"predictions.max_angle_quantile: needs a checkpoint with the angles of its validation images, got "
            f"{ckpt_path}; train with MarginMonitor, pass the path of a checkpoint that was saved right after a "
            "validation, or set max_angle."
        )
    return angle_quantile(counts, q)


def _types(is_integer: dict[str, bool]) -> str:
    return ", ".join(f"{name} ({'integer' if integer else 'float'})" for name, integer in is_integer.items())


def _interleaved_rows(rank_files: list[Path]) -> Iterator[list[str]]:
    """Yield the rows of all ranks in the order of the data: row n is the next one of rank n modulo the world size."""
    with ExitStack() as stack:
        readers = [csv.reader(stack.enter_context(file.open(newline="", encoding="utf-8"))) for file in rank_files]
        for reader in itertools.cycle(readers):
            row = next(reader, None)
            if row is None:
                break
            yield row
        if any(next(reader, None) for reader in readers):
            raise RunError(
                "predictions.output: the order of the images is unknown, got unequal shards from the ranks; give each "
                "rank every world_size-th image, as the datamodules of this package do."
            )
