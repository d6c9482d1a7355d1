"""Datamodules of faces: training on folders of identities, verification on pairs of LFW."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from typing_extensions import override

from ..errors import DataError, InputError
from ..pairs import Pairs
from .base import Images
from .files import FileDataModule, Files, class_folders, list_files
from .images import special_kind

_SPACE_SEPARATED = re.compile(r"([^\t]+?) +(\d+) +(?:([^\t]+?) +)?(\d+)")  # a line without tabs


class Pair(NamedTuple):
    """A pair of images."""

    first: tuple[str, int]
    """Person and image number of the first image."""
    second: tuple[str, int]
    """Person and image number of the second image."""
    fold: int
    """Fold of the pair, from 1."""

    @property
    def people(self) -> set[str]:
        """Names of the one or two people in the pair."""
        return {self.first[0], self.second[0]}


def read_pairs(path: Path) -> list[Pair]:
    """Read LFW's ``pairs.txt``.

    The first line contains the number of folds and the number of pairs of each kind per fold. Each fold has lines
    ``person n1 n2`` of same pairs, then lines ``person n1 other n2`` of different pairs. Fields are separated by tabs,
    or by spaces in lines without a tab.

    Raises:
        DataError: If the file is missing or not of this form, or contains a pair twice.
    """
    if not path.is_file():
        raise DataError(
            f"{path.absolute()}: the file does not exist; place LFW's list of pairs there, beside the folder images."
        )
    try:
        header, *lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8: {error}") from error
    match header.split():
        case [folds_, count_] if folds_.isdecimal() and count_.isdecimal() and int(folds_) and int(count_):
            folds, count = int(folds_), int(count_)
        case _:
            raise DataError(
                f"{path}: the first line must be the number of folds and the number of pairs of each kind per fold, "
                f"such as '10 300', got {header!r}."
            )
    pairs: list[Pair] = []
    seen: dict[frozenset[tuple[str, int]], int] = {}
    for line_number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        same = len(pairs) % (2 * count) < count
        pair = _parse_pair(line, len(pairs) // (2 * count) + 1, same)
        if pair is None:
            form = "person n1 n2" if same else "person n1 other n2"
            raise DataError(f"{path}, line {line_number}: must be a pair '{form}', got {line.strip()!r}.")
        key = frozenset(pair[:2])
        if key in seen:
            raise DataError(f"{path}, line {line_number}: repeats the pair of line {seen[key]}, got {line.strip()!r}.")
        seen[key] = line_number
        pairs.append(pair)
    if len(pairs) != 2 * folds * count:
        raise DataError(
            f"{path}: must have {folds} x 2 x {count} pairs by its first line, got {len(pairs)}; restore the file."
        )
    return pairs


def _parse_pair(line: str, fold: int, same: bool) -> Pair | None:
    """Return the pair of a line; None if the line is not a pair of this kind."""
    separated = _SPACE_SEPARATED.fullmatch(line.strip())
    match [field for field in separated.groups() if field] if separated else line.strip().split("\t"):
        case [person, first, second] if same and first.isdecimal() and second.isdecimal() and int(first) != int(second):
            return Pair((person, int(first)), (person, int(second)), fold)
        case [person, first, other, second] if (
            not same and first.isdecimal() and second.isdecimal() and person != other
        ):
            return Pair((person, int(first)), (other, int(second)), fold)
    return None


class PairsDataModule(FileDataModule):
    """Base class of verification on LFW; a subclass sets the attributes.

    Validation and test batches are (images, image indices). They contain each image once, and the pairs refer to these
    indices.

    Args:
        root: Folder of LFW, with ``pairs.txt`` and ``images/<Person>/<Person>_<nnnn>.jpg`` or another image format.
            The images must be aligned like the training images.
        image_size: Side of square images, or height and width. Images are scaled to cover this size and their centre is
            cropped.
        **kwargs: Arguments of :class:`FileDataModule`. An unreadable image of a pair is always an error.

    Attributes:
        train_files: Training images.
        val_files: Images of the validation pairs.
        test_files: Images of the test pairs.
        val_pairs: Validation pairs.
        test_pairs: Test pairs. Pairs of fold 0 are only used to fit the threshold and the PCA.

    Raises:
        DataError: If files are missing, or ``pairs.txt`` is damaged.
        InputError: If a setting is out of range.
    """

    train_files: Files
    val_files: Files
    test_files: Files
    val_pairs: Pairs
    test_pairs: Pairs

    def __init__(self, root: str, image_size: int | tuple[int, int] = (112, 96), **kwargs: Any) -> None:
        super().__init__(image_size, **kwargs)
        self.root = Path(root)
        self.pairs = read_pairs(self.root / "pairs.txt")

    def index_images(self, pairs: Sequence[Pair]) -> tuple[Files, Pairs]:
        """Return the image files of pairs, each once, and the pairs as indices of these files.

        Args:
            pairs: Pairs of :func:`read_pairs`.

        Raises:
            DataError: If an image is missing, exists with two extensions, or is a FIFO, a socket or a device.
        """
        image_ids: dict[tuple[str, int], int] = {}
        for pair in pairs:
            image_ids.setdefault(pair.first, len(image_ids))
            image_ids.setdefault(pair.second, len(image_ids))
        found_paths = _find_images(self.root / "images", {person for person, _ in image_ids})
        names = [f"{person}/{person}_{image_number:04d}" for person, image_number in image_ids]
        for name in names:
            if len(files := found_paths.get(name, [])) > 1:
                raise DataError(
                    f"{files[0].parent}: must contain one file of each image in pairs.txt, got "
                    f"{' and '.join(file.name for file in files)}; remove all but one."
                )
        paths = [found_paths.get(name, [self.root / "images" / f"{name}.jpg"])[0] for name in names]
        missing = [path for path in paths if not path.is_file()]
        for path in missing:
            if kind := special_kind(path):
                raise DataError(f"{path} is {kind}, not an image: replace it.")
        if missing:
            raise DataError(
                f"{len(missing)} of {len(paths)} images in pairs.txt do not exist, such as {missing[0]}; add them."
            )
        indexed = Pairs(
            first=torch.tensor([image_ids[pair.first] for pair in pairs]),
            second=torch.tensor([image_ids[pair.second] for pair in pairs]),
            same=torch.tensor([len(pair.people) == 1 for pair in pairs]),
            fold=torch.tensor([pair.fold for pair in pairs]),
        )
        return Files(paths, list(range(len(paths))), required=True), indexed

    def load_train_val(self) -> tuple[Images, Images]:
        """Read the images of all splits, including test, to report all unreadable files before training."""
        self._check_train_size(self.train_files.targets)
        train_data, val_data, self.test_data = self.read(self.train_files, self.val_files, self.test_files)
        return train_data, val_data

    @override
    def load_test(self) -> Images:
        (test_data,) = self.read(self.test_files)
        return test_data


class LFWDataModule(PairsDataModule):
    """Training on a folder of identities such as CASIA-WebFace, validation and test on the 6,000 pairs of LFW.

    Validation and test use the same pairs, so do not select a checkpoint by the validation metrics. A warning names
    identities that are also people of LFW. It compares folder names, and therefore misses people in numbered folders,
    which are common for CASIA-WebFace.

    Args:
        train_root: Folder of ``<identity>/*``.
        root: Folder of LFW, with ``pairs.txt`` and ``images/<Person>/<Person>_<nnnn>.jpg``.
        **kwargs: Arguments of :class:`PairsDataModule`.
    """

    def __init__(self, train_root: str, root: str = "data/lfw", **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        folders = class_folders(Path(train_root))
        self.class_names = tuple(folder.name for folder in folders)
        self.train_files = list_files(folders)
        self.val_files, self.val_pairs = self.test_files, self.test_pairs = self.index_images(self.pairs)
        people = {_normalized_name(person) for pair in self.pairs for person in pair.people}
        overlap = [name for name in self.class_names if _normalized_name(name) in people]
        if overlap:
            rank_zero_warn(
                f"{len(overlap)} of {len(folders)} identities in {train_root} are people of LFW by name, such as "
                f"{', '.join(overlap[:3])}; remove these folders to test on unseen people."
            )


class LFWFoldDataModule(PairsDataModule):
    """Training on people of LFW and test on the pairs of one fold, without outside data.

    Without ``val_fold``, the network trains on all images of the people of the other nine folds. The pairs of these
    folds are used for validation, and to fit the threshold and the PCA. The validation metrics are optimistic, because
    the network has seen these people in training.

    With ``val_fold``, the network trains on eight folds. The pairs of the ninth, with people unseen in training, are
    used for validation, threshold and PCA. The validation metrics can then select settings or a checkpoint.

    Args:
        root: Folder of LFW, with ``pairs.txt`` and ``images/<Person>/<Person>_<nnnn>.jpg``.
        fold: Fold to test on, from 1.
        val_fold: Fold to hold out from training, from 1. Validation divides its pairs into ten folds, which share
            people.
        **kwargs: Arguments of :class:`PairsDataModule`.

    Raises:
        DataError: If files are missing, or ``pairs.txt`` is damaged.
        InputError: If a setting is out of range.
    """

    def __init__(self, root: str = "data/lfw", fold: int = 10, val_fold: int | None = None, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        folds = self.pairs[-1].fold
        for name, value in (("fold", fold), ("val_fold", val_fold)):
            if value is not None and not 1 <= value <= folds:
                raise InputError(
                    f"{name}: must be one of the {folds} folds of pairs.txt, got {value}; set 1 to {folds}."
                )
        if fold == val_fold or folds < 3:
            raise InputError(
                f"fold and val_fold: must differ, and pairs.txt must have at least 3 folds, got {fold}, {val_fold} and "
                f"{folds} folds; set another val_fold."
            )
        test = [pair for pair in self.pairs if pair.fold == fold]
        val = [pair for pair in self.pairs if pair.fold != fold and val_fold in (None, pair.fold)]
        self.test_files, self.test_pairs = self.index_images([*(pair._replace(fold=0) for pair in val), *test])
        if val_fold is not None:
            val = [pair._replace(fold=index % 10 + 1) for index, pair in enumerate(val)]
        self.val_files, self.val_pairs = self.index_images(val)
        held_out = {person for pair in self.pairs if pair.fold in (fold, val_fold) for person in pair.people}
        self.class_names = tuple(sorted({person for pair in self.pairs for person in pair.people} - held_out))
        self.train_files = list_files([self.root / "images" / person for person in self.class_names])


def _find_images(root: Path, people: Iterable[str]) -> dict[str, list[Path]]:
    """Return the files of the images of people by their path relative to ``root``, without the extension."""
    extensions = Image.registered_extensions()
    folders = [root / person for person in people if (root / person).is_dir()]
    found: dict[str, list[Path]] = {}
    for path in (path for folder in folders for path in sorted(folder.iterdir())):
        if path.suffix.lower() in extensions:
            found.setdefault(f"{path.parent.name}/{path.stem}", []).append(path)
    return found


def _normalized_name(name: str) -> str:
    return name.lower().replace(" ", "_")
