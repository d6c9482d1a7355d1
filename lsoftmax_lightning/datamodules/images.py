"""Where images are kept: in memory, or in files of any kind and size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from ..errors import DataError


class ImageStore(Protocol):
    """What images may be kept in: a tensor, or anything that an index tensor makes into one."""

    def __len__(self) -> int:
        """How many images there are."""

    def __getitem__(self, index: Tensor) -> Tensor:
        """Images [N, C, H, W] for an index [N]."""


class ImageSubset:
    """Some images of a store, without a copy of them.

    Args:
        store: All images, ``(M, ...)``.
        rows: Indices of the subset's images in the store, ``(N,)``.
        paths: File of each image of the subset, where there are files.
    """

    def __init__(self, store: ImageStore, rows: Tensor, paths: Sequence[str | Path] = ()) -> None:
        self.store, self.rows, self.paths = store, rows, paths

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.store[self.rows[index]]


def read_image(path: str | Path, size: tuple[int, int], channels: int = 3) -> Tensor:
    """Reads a file, turned as its EXIF data say, scaled to cover ``size`` and cropped to its middle.

    Grey images and palettes become colours, or all become grey; what is transparent loses its transparency; an
    animation gives its first frame.

    Args:
        path: A file of any format that Pillow reads.
        size: Height and width.
        channels: 3 for colours, 1 for grey.

    Returns:
        uint8 [channels, height, width].

    Raises:
        ValueError: If a pixel has more than 8 bits a channel, of which Pillow would keep the wrong ones.
        Exception: Whatever the decoder raises on a damaged file.
    """
    with Image.open(path) as image:
        image.draft("RGB", (2 * max(size),) * 2)  # a JPEG much larger than that is decoded at a fraction of its size
        if image.mode[0] in "IF":
            raise ValueError(f"its pixels have more than 8 bits (mode {image.mode})")
        upright = ImageOps.exif_transpose(image)
        if "transparency" in upright.info:  # of a palette, which Pillow converts in two steps
            upright = upright.convert("RGBA")
        pixels: Tensor = pil_to_tensor(ImageOps.fit(upright.convert("RGB" if channels == 3 else "L"), size[::-1]))
    return pixels


class ImageFiles:
    """Images read from their files whenever a batch asks for them.

    Args:
        paths: The files.
        image_shape: Channels, height and width of the images, as :func:`read_image` makes them.
    """

    def __init__(self, paths: Sequence[str | Path], image_shape: tuple[int, int, int]) -> None:
        self.paths, self.image_shape = paths, image_shape

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor) -> Tensor:
        return torch.stack([self._read(self.paths[i]) for i in index.tolist()])

    def _read(self, path: str | Path) -> Tensor:
        channels, *size = self.image_shape
        try:
            return read_image(path, (size[0], size[1]), channels)
        except Exception as error:  # decoders raise whatever they meet in a damaged file
            raise DataError(f"{path} is no readable image: {error or type(error).__name__}") from error


def select(images: ImageStore, index: Tensor) -> ImageStore:
    """Return the images at ``index``; only images in a plain tensor are copied.

    Args:
        images: Images, ``(M, ...)``.
        index: Indices of the images to select, ``(N,)``.
    """
    if isinstance(images, Tensor):
        return images[index]
    if isinstance(images, ImageFiles):
        return ImageFiles([images.paths[i] for i in index.tolist()], images.image_shape)
    if isinstance(images, ImageSubset):
        paths = [images.paths[i] for i in index.tolist()] if images.paths else ()
        return ImageSubset(images.store, images.rows[index], paths)
    return ImageSubset(images, index)


def files_in(folder: str | Path) -> list[str]:
    """All files in a folder and the folders in it, sorted; hidden ones are left out.

    Raises:
        DataError: If there are none, a folder cannot be read, or a name is not UTF-8.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error

    found: list[str] = []
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(place, name) for name in names if not name.startswith(".")]
    if not found:
        raise DataError(f"there is no image in {Path(folder).absolute()}, nor in a folder in it.")
    for path in found:
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the name of {path!a} is not UTF-8: rename it.") from error
    found.sort()
    return found
