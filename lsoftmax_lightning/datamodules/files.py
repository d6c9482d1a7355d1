"""Images in files: decoded once into memory, or by workers for each batch where they are too many for that."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import DataError, InputError
from ..signals import ignore_signals
from .base import BatchDataModule, Images
from .images import ImageFiles, ImageStore, ImageSubset, read_image, visible_entries

_NAMED = 10  # files that an error names
_MAX_WORKERS = 1024  # processes; more than any machine has a use for


class Files(NamedTuple):
    """Paths of images, the class of each, and whether every one of them is needed, even if unreadable ones are not."""

    paths: list[Path]
    targets: list[int]
    needed: bool = False


def class_folders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted by name; hidden ones are left out.

    Raises:
        DataError: If the folder is not there, or holds files beside its folders, which no class would take; or as
            :func:`visible_entries`.
    """
    entries = _visible(folder, "one folder of images for each class")
    files = [entry.name for entry in entries if not entry.is_dir()]
    if files:
        raise DataError(f"{folder} must hold class folders alone; take away {', '.join(files[:_NAMED])}.")
    return [Path(entry.path) for entry in entries]


def list_files(folders: Sequence[Path]) -> Files:
    """The files in class folders, each with the number of its folder as its class; hidden ones are left out.

    Raises:
        DataError: If a folder is missing or empty, or holds folders; or as :func:`visible_entries`.
    """
    contents = [_visible(folder, "images") for folder in folders]
    inner = [entry.path for files in contents for entry in files if entry.is_dir()]
    if inner:
        raise DataError(f"a class folder must hold images alone; take away the folders {', '.join(inner[:_NAMED])}.")
    empty = [str(folder) for folder, files in zip(folders, contents, strict=True) if not files]
    if empty:
        raise DataError(f"every class folder must hold an image; these are empty: {', '.join(empty[:_NAMED])}.")
    return Files(
        [Path(entry.path) for files in contents for entry in files],
        [target for target, files in enumerate(contents) for _ in files],
    )


def _visible(folder: Path, content: str) -> list[os.DirEntry[str]]:
    if not folder.is_dir():
        raise DataError(f"the folder {folder.absolute()} is not there; it must hold {content}.")
    try:
        return visible_entries(folder)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error


class _FirstReading:
    """Chunks of images, zeros where one cannot be read, and what is the matter with those."""

    def __init__(self, paths: Sequence[Path], size: tuple[int, int], keep: bool) -> None:
        self.paths, self.size, self.keep = paths, size, keep

    def __getitem__(self, chunk: range) -> tuple[Tensor, dict[int, str]]:
        images = torch.zeros(len(chunk) if self.keep else 0, 3, *self.size, dtype=torch.uint8)
        problems = {}
        for row, number in enumerate(chunk):
            try:
                image = read_image(self.paths[number], self.size)
            except Exception as error:  # decoders raise whatever they meet in a damaged file
                problems[number] = str(error) or type(error).__name__
                continue
            if self.keep:
                images[row] = image
        return images, problems


class FileDataModule(BatchDataModule):
    """Images in files of any kind and size; a subclass says which.

    Args:
        image_size: Side of the square images, or height and width. An image is scaled to cover that and its middle cut
            out.
        mean: Mean of each colour, in 0 .. 1; by default that of ImageNet, as pretrained backbones want it.
        std: Likewise the standard deviation.
        memory_gib: The images are kept in memory while all of them take no more than this, in GiB and for each
            process; beyond it every batch is read from the files.
        num_workers: Processes that read the files; by default one for each of torch's threads, up to 8.
        skip_unreadable: Whether to leave out, and count in a warning, files for training that are no readable images,
            instead of naming them in an error.
        **kwargs: As :class:`BatchDataModule`: ``batch_size``, ``crop_padding``, ``flip``, ``predict_folder``,
            ``train_size``, ``label_noise``, ``train_seed``. Every training file is decoded once, whatever the
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
            raise InputError(f"image_size must be at least one pixel, got {image_size}.")
        limit = Image.MAX_IMAGE_PIXELS  # of Pillow, against images that fill the memory
        if limit is not None and height * width > limit:
            raise InputError(
                f"image_size: must have at most {limit:,} pixels, as many as Pillow decodes, got {image_size}; use, "
                "e.g., 224."
            )
        if not (all(0 <= value <= 1 for value in mean) and all(0 < value <= 1 for value in std)):
            raise InputError(f"mean must be within 0 .. 1 and std above 0, at most 1, got {mean} and {std}.")
        if (num_workers or 0) < 0 or not memory_gib >= 0:
            raise InputError(f"num_workers and memory_gib must be 0 or more, got {num_workers} and {memory_gib}.")
        if (num_workers or 0) > _MAX_WORKERS:
            raise InputError(
                f"num_workers: must be at most {_MAX_WORKERS}, since each is a process, got {num_workers}; use the "
                "number of CPU cores."
            )
        self.image_shape, self.mean, self.std = (3, height, width), mean, std
        super().__init__(**kwargs)
        self.memory_gib = memory_gib
        if num_workers is not None:
            self.num_workers = num_workers
        self.skip_unreadable = skip_unreadable

    def read(self, *parts: Files) -> list[Images]:
        """Reads files under a progress bar; decodes each once even where the images are not kept.

        Raises:
            DataError: If a file is no readable image; it names all of them, up to a screen. Or if skipping such files
                leaves none of a class.
        """
        paths = list(dict.fromkeys(path for part in parts for path in part.paths))  # parts may share images
        size, image_bytes = self.image_shape[1:], math.prod(self.image_shape)
        in_memory = len(paths) * image_bytes <= self.memory_gib * 2**30
        store = torch.empty(len(paths) if in_memory else 0, *self.image_shape, dtype=torch.uint8)
        step = max(1, min(256, 2**24 // image_bytes))  # of 16 MiB at most
        chunks = [range(len(paths))[start : start + step] for start in range(0, len(paths), step)]
        reading = iter(
            DataLoader(
                _FirstReading(paths, size, keep=in_memory),  # type: ignore[arg-type] # indexed by chunk
                batch_size=None,
                sampler=chunks,
                num_workers=self.num_workers,
                worker_init_fn=ignore_signals,
                generator=torch.Generator(),
            )
        )  # its processes start before the progress bar's thread
        hidden = self.trainer and (self.trainer.progress_bar_callback is None or not self.trainer.is_global_zero)
        problems: dict[Path, str] = {}
        for chunk in track(chunks, "Reading images", disable=bool(hidden)):
            store[chunk.start : chunk.stop], found = next(reading)
            problems |= {paths[number]: problem for number, problem in found.items()}
        if problems:
            self._report(parts, problems, len(paths))

        rows = {path: row for row, path in enumerate(paths)}
        data = []
        for part in parts:
            kept = [
                (path, target) for path, target in zip(part.paths, part.targets, strict=True) if path not in problems
            ]
            lost = set(part.targets) - {target for _, target in kept}
            if lost:
                first = part.paths[part.targets.index(min(lost))].parent
                raise DataError(f"no readable image is left in {first} (and {len(lost) - 1} other class folders).")
            images: ImageStore
            own = [path for path, _ in kept]
            if in_memory:
                images = ImageSubset(store, torch.tensor([rows[path] for path in own]), own)
            else:
                images = ImageFiles(own, self.image_shape)
            data.append(Images(images, torch.tensor([target for _, target in kept])))
        return data

    def _report(self, parts: Sequence[Files], problems: dict[Path, str], count: int) -> None:
        named = [f"\n  {path}: {problem}" for path, problem in list(problems.items())[:_NAMED]]
        more = "\n  ..." * (len(problems) > _NAMED)
        message = f"{len(problems)} of {count} files are no readable images:{''.join(named)}{more}"
        if any(part.needed and not problems.keys().isdisjoint(part.paths) for part in parts):
            raise DataError(f"{message}\nMend them: pairs need them.")
        if not self.skip_unreadable:
            raise DataError(f"{message}\nMend them or take them away, or leave them out with skip_unreadable=true.")
        rank_zero_warn(f"Skipping {message}")
