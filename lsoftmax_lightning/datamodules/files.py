"""Base class of datamodules of image files, which are decoded once into memory or for each batch."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from rich import get_console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from ..compat import end_workers
from ..errors import DataError, InputError
from ..signals import ignore_signals
from .base import UNKNOWN_CLASS, BatchDataModule, Images
from .images import ImageFiles, ImageStore, ImageSubset, read_image, visible_entries

_MAX_REPORTED = 10  # files in an error message
_MAX_WORKERS = 1024  # processes; more than any machine can use


class Files(NamedTuple):
    """Image files and their classes."""

    paths: list[Path]
    """File of each image."""
    targets: list[int]
    """Class of each image."""
    required: bool = False
    """Whether an unreadable file is an error even if ``skip_unreadable`` is set."""


def class_folders(folder: Path) -> list[Path]:
    """List the folders in a folder, sorted by name, without hidden ones.

    Raises:
        DataError: If the folder does not exist or contains files, or for the reasons of :func:`visible_entries`.
    """
    entries = _list_entries(folder, "one folder of images for each class")
    files = [entry.name for entry in entries if not entry.is_dir()]
    if files:
        raise DataError(
            f"{folder}: must contain only class folders, got {', '.join(files[:_MAX_REPORTED])}; remove other files."
        )
    return [Path(entry.path) for entry in entries]


def list_files(folders: Sequence[Path]) -> Files:
    """List the files in class folders, without hidden ones; the class of a file is the index of its folder.

    Raises:
        DataError: If a folder is missing or empty or contains folders, or for the reasons of :func:`visible_entries`.
    """
    contents = [_list_entries(folder, "images") for folder in folders]
    subfolders = [entry.path for files in contents for entry in files if entry.is_dir()]
    if subfolders:
        raise DataError(
            f"class folders: must contain only images, got the folders {', '.join(subfolders[:_MAX_REPORTED])}; remove "
            "them."
        )
    empty = [str(folder) for folder, files in zip(folders, contents, strict=True) if not files]
    if empty:
        raise DataError(
            f"class folders: each must contain an image, but these are empty: {', '.join(empty[:_MAX_REPORTED])}; add "
            "images."
        )
    return Files(
        [Path(entry.path) for files in contents for entry in files],
        [target for target, files in enumerate(contents) for _ in files],
    )


def _list_entries(folder: Path, content: str) -> list[os.DirEntry[str]]:
    if not folder.is_dir():
        raise DataError(f"{folder.absolute()}: the folder does not exist; it must contain {content}.")
    try:
        return visible_entries(folder)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error


class _ChunkReader:
    """Dataset of chunks of images.

    An item is the images of a chunk, with zeros for unreadable ones, and the error of each unreadable image by index.

    Args:
        paths: File of each image.
        size: Height and width.
        keep: Whether to return the images, or only to decode them.
    """

    def __init__(self, paths: Sequence[Path], size: tuple[int, int], keep: bool) -> None:
        self.paths = paths
        self.size = size
        self.keep = keep

    def __getitem__(self, chunk: range) -> tuple[Tensor, dict[int, str]]:
        images = torch.zeros(len(chunk) if self.keep else 0, 3, *self.size, dtype=torch.uint8)
        problems = {}
        for row, index in enumerate(chunk):
            try:
                image = read_image(self.paths[index], self.size)
            except Exception as error:  # decoders may raise any error on a damaged file
                problems[index] = str(error) or type(error).__name__
                continue
            if self.keep:
                images[row] = image
        return images, problems


class FileDataModule(BatchDataModule):
    """Datamodule of images in files of any format and size; a subclass selects the files.

    Args:
        image_size: Side of square images, or height and width. Images are scaled to cover this size and their centre is
            cropped.
        mean: Mean of each channel, in 0 .. 1. The default is the mean of ImageNet, as for pretrained backbones.
        std: Standard deviation of each channel, in 0 .. 1. The default is that of ImageNet.
        memory_gib: Largest total size in GiB of images to keep in memory, on each rank. If the images are larger, every
            batch is read from the files.
        num_workers: Number of processes that read the files. The default is the number of torch's threads, at most 8.
        skip_unreadable: Whether to skip unreadable files with a warning instead of raising an error. Before the
            prediction of a folder, every file is then decoded once to find them. Otherwise, the first unreadable file
            ends the prediction.
        **kwargs: Arguments of :class:`BatchDataModule`: ``batch_size``, ``crop_padding``, ``flip``, ``predict_folder``,
            ``train_size``, ``label_noise``, ``train_seed``. Every training file is decoded once, for any
            ``train_size``.

    Raises:
        InputError: If a setting is out of range.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        memory_gib: float = 4.0,
        num_workers: int | None = None,
        skip_unreadable: bool = False,
        **kwargs: Any,
    ) -> None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if min(height, width) < 1:
            raise InputError(f"image_size: must be at least 1 pixel, got {image_size}; the usual size is 224.")
        limit = Image.MAX_IMAGE_PIXELS  # Pillow's limit, against images that fill the memory
        if limit is not None and height * width > limit:
            raise InputError(
                f"image_size: must have at most {limit:,} pixels, Pillow's limit, got {image_size}; the usual size "
                "is 224."
            )
        if (num_workers or 0) < 0 or not memory_gib >= 0:
            raise InputError(
                f"num_workers and memory_gib: must be at least 0, got {num_workers} and {memory_gib}; raise them."
            )
        if (num_workers or 0) > _MAX_WORKERS:
            raise InputError(
                f"num_workers: must be at most {_MAX_WORKERS} processes, got {num_workers}; use the number of CPU "
                "cores."
            )
        self.image_shape, self.mean, self.std = (3, height, width), mean, std
        super().__init__(**kwargs)
        self.memory_gib = memory_gib
        if num_workers is not None:
            self.num_workers = num_workers
        self.skip_unreadable = skip_unreadable

    def load_predict(self, paths: list[str]) -> Images:
        """Return the images of ``predict_folder``, without unreadable ones if ``skip_unreadable`` is set."""
        if not self.skip_unreadable:
            return super().load_predict(paths)
        return self.read(Files([Path(path) for path in paths], [UNKNOWN_CLASS] * len(paths)))[0]

    def read(self, *splits: Files) -> list[Images]:
        """Read the images of each split, with a progress bar.

        Every file is decoded once, even if the images do not fit in memory.

        Args:
            *splits: Files of each split. Splits may share files, which are kept in memory once.

        Raises:
            DataError: If files are not readable images (the message names the first ten), or if a class has no readable
                image left.
        """
        paths = list(dict.fromkeys(path for split in splits for path in split.paths))
        size, image_bytes = self.image_shape[1:], math.prod(self.image_shape)
        in_memory = len(paths) * image_bytes <= self.memory_gib * 2**30
        store = torch.empty(len(paths) if in_memory else 0, *self.image_shape, dtype=torch.uint8)
        step = max(1, min(256, 2**24 // image_bytes))  # a chunk of at most 16 MiB
        chunks = [range(len(paths))[start : start + step] for start in range(0, len(paths), step)]
        reading = iter(
            DataLoader(
                _ChunkReader(paths, size, keep=in_memory),  # type: ignore[arg-type] # indexed by chunk
                batch_size=None,
                sampler=chunks,
                num_workers=self.num_workers,
                worker_init_fn=ignore_signals,
                generator=torch.Generator(),
            )
        )  # iter() starts the workers before the progress bar starts its thread
        trainer = self.trainer
        has_bar = trainer is None or (trainer.progress_bar_callback is not None and trainer.is_global_zero)
        is_shown = has_bar and get_console().file.isatty()
        problems: dict[Path, str] = {}
        try:
            for chunk in track(chunks, "Reading images", disable=not is_shown):
                store[chunk.start : chunk.stop], found = next(reading)
                problems |= {paths[index]: problem for index, problem in found.items()}
        finally:
            end_workers(reading)  # the garbage collector would wait ten seconds for them, at any time
        if problems:
            self._report(splits, problems, len(paths))

        rows = {path: row for row, path in enumerate(paths)}
        data = []
        for split in splits:
            kept = [index for index, path in enumerate(split.paths) if path not in problems]
            kept_paths, kept_targets = [split.paths[i] for i in kept], [split.targets[i] for i in kept]
            empty = set(split.targets) - set(kept_targets)
            if UNKNOWN_CLASS in empty:
                raise DataError(
                    f"predict_folder: must have a readable image, got none in {len(split.paths)} files; add images."
                )
            if empty:
                first = split.paths[split.targets.index(min(empty))].parent
                raise DataError(
                    f"class folders: each must have a readable image, got {len(empty)} without, as {first}; add images."
                )
            images: ImageStore
            if in_memory:
                images = ImageSubset(store, torch.tensor([rows[path] for path in kept_paths]), kept_paths)
            else:
                images = ImageFiles(kept_paths, self.image_shape)
            data.append(Images(images, torch.tensor(kept_targets)))
        return data

    def _report(self, splits: Sequence[Files], problems: dict[Path, str], num_files: int) -> None:
        lines = [f"\n  {path}: {problem}" for path, problem in list(problems.items())[:_MAX_REPORTED]]
        if len(problems) > _MAX_REPORTED:
            lines.append("\n  ...")
        count, details = f"{len(problems)} of {num_files} files", "".join(lines)
        if any(split.required and not problems.keys().isdisjoint(split.paths) for split in splits):
            raise DataError(f"{count} are not readable images:{details}\nReplace them; pairs.txt requires them.")
        if not self.skip_unreadable:
            raise DataError(
                f"{count} are not readable images:{details}\nReplace or remove them, or set data.skip_unreadable true."
            )
        rank_zero_warn(f"Skipping {count} that are not readable images:{details}")
