"""Classes sharded over the ranks of a process group."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor


class ClassShard(NamedTuple):
    """The classes of one rank, and collectives over all of them."""

    group: dist.ProcessGroup | None
    """Group of all ranks; None if one rank has all classes."""
    start: int
    """Index of the first class on this rank."""
    num_classes: int
    """Number of classes on all ranks."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def all_gather(self, rows: Tensor) -> Tensor:
        """Gather the rows of all ranks; every rank must pass the same number."""
        if self.group is None:
            return rows
        gathered = rows.new_empty(self.world_size * len(rows), *rows.shape[1:])
        dist.all_gather(list(gathered.chunk(self.world_size)), rows.contiguous(), group=self.group)
        return gathered

    def all_reduce_(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce ``x`` over all ranks, in place, and return it."""
        if self.group is not None:
            dist.all_reduce(x, op, group=self.group)
        return x

    def local_rows(self, rows: Tensor) -> Tensor:
        """Return the rows of this rank from the result of :meth:`all_gather`."""
        if self.group is None:
            return rows
        return rows.chunk(self.world_size)[dist.get_rank(self.group)]
