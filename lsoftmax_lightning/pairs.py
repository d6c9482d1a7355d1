"""Pairs of images for face verification."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InputError


@dataclass(frozen=True, eq=False)
class Pairs:
    """Table of P pairs of images, by column.

    Args:
        first: Index of one image of each pair, int64, ``(P,)``.
        second: Index of the other image, int64, ``(P,)``.
        same: Whether both images show the same identity, bool, ``(P,)``.
        fold: Fold of each pair, from 1, int64, ``(P,)``. Pairs of fold 0 are only used for fitting and never scored.

    Example:
        >>> import torch
        >>> from lsoftmax_lightning.pairs import Pairs
        >>> pairs = Pairs.from_table(torch.tensor([[0, 1, 1, 1], [0, 2, 0, 2]]))
        >>> pairs.same
        tensor([ True, False])
    """

    first: Tensor
    second: Tensor
    same: Tensor
    fold: Tensor

    @classmethod
    def from_table(cls, table: Tensor) -> Pairs:
        """Read a table of one pair per row.

        Args:
            table: int64, ``(P, 4)``, with the columns index of one image, index of the other image, 1 for the same
                identity or 0, and fold.

        Raises:
            InputError: If the table is not of this form.
        """
        if table.ndim != 2 or table.shape[1] != 4 or table.dtype != torch.int64 or bool((table < 0).any()):
            raise InputError(
                f"pairs: must be int64 (P, 4) and not negative, got {table.dtype} {tuple(table.shape)}; use Pairs."
            )
        first, second, same, fold = table.unbind(1)
        if bool((same > 1).any()):
            raise InputError(
                f"pairs: column 2 must be 1 for same and 0 for different pairs, got {int(same.max())}; correct it."
            )
        return cls(first, second, same.bool(), fold)

    def __len__(self) -> int:
        return len(self.fold)

    def __getitem__(self, rows: Tensor) -> Pairs:
        """Select pairs by a mask or by indices."""
        return Pairs(self.first[rows], self.second[rows], self.same[rows], self.fold[rows])

    @property
    def is_scored(self) -> Tensor:
        """Whether each pair is scored, bool, ``(P,)``."""
        return self.fold > 0

    @property
    def image_ids(self) -> Tensor:
        """Indices of the images in all pairs, sorted, each once."""
        image_ids: Tensor = torch.unique(torch.cat([self.first, self.second]))
        return image_ids

    def cpu(self) -> Pairs:
        """Return the pairs on the CPU."""
        return Pairs(self.first.cpu(), self.second.cpu(), self.same.cpu(), self.fold.cpu())


def pairs_of(datamodule: object, stage: str) -> Pairs | None:
    """Return the validation or test pairs of a datamodule; None if it evaluates on classes.

    Args:
        datamodule: A datamodule. ``val_pairs`` and ``test_pairs`` may be :class:`Pairs` or a table for
            :meth:`Pairs.from_table`.
        stage: ``val`` or ``test``.

    Raises:
        InputError: If a table is not of this form.
    """
    pairs: Pairs | Tensor | None = getattr(datamodule, f"{stage}_pairs", None)
    return Pairs.from_table(pairs) if isinstance(pairs, Tensor) else pairs
