"""Whole batches out of images in memory or in files, divided over the processes of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..compat import worker_message
from ..errors import DataError, InputError
from ..seeds import hashed_seed
from ..signals import ignore_signals
from .images import ImageStore, ImageSubset

DRAWS = 2**24
"""A draw over this is exact in float32, and uniform on [0, 1)."""


def seeded_generator(key: str) -> torch.Generator:
    """Return a generator with a seed made from ``key`` (:func:`~lsoftmax_lightning.seeds.hashed_seed`)."""
    return torch.Generator().manual_seed(hashed_seed(key))


class BatchSampler:
    """Index tensors of this process's share of every global batch.

    The global batches are a function of (seed, epoch) alone, so a run is the same on one process and on several, and
    no sample is repeated to fill a process up.

    Args:
        num_samples: How many samples there are.
        batch_size: Global batch size.
        shuffle: Whether each epoch has an order of its own.
        drop_last: Whether to leave out a last batch that is not whole, as training does: its mean gradient over
            several processes would not be that of one.
        rank: This process.
        world_size: Number of processes.
        seed: Seed of the shuffle.

    Raises:
        InputError: If a batch does not divide over the processes, or there are fewer samples than a whole batch (with
            ``drop_last``) or than processes.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        shuffle: bool,
        drop_last: bool,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        if batch_size % world_size:
            raise InputError(
                f"batch_size is global and must divide over the devices: {batch_size} does not over {world_size}; "
                f"take {batch_size // world_size * world_size or world_size}."
            )
        if num_samples < (batch_size if drop_last else world_size):
            raise InputError(
                f"{num_samples} samples are too few for "
                + (f"batch_size {batch_size}; lower it." if drop_last else f"{world_size} devices; use fewer.")
            )
        self.num_samples, self.batch_size, self.shuffle, self.drop_last = num_samples, batch_size, shuffle, drop_last
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the shuffle of an epoch; the Trainer calls it."""
        self.epoch = epoch

    def generator(self, purpose: str = "") -> torch.Generator:
        """A generator for this epoch and purpose, the same on every process."""
        return seeded_generator(f"{self.seed} {self.epoch}{purpose}")

    def __len__(self) -> int:
        whole, rest = divmod(self.num_samples, self.batch_size)
        return whole + (not self.drop_last and self.rank < rest)

    def __iter__(self) -> Iterator[Tensor]:
        if self.shuffle:
            order = torch.randperm(self.num_samples, generator=self.generator())
        else:
            order = torch.arange(self.num_samples)
        for batch in torch.split(order, self.batch_size)[: len(self)]:
            yield batch[self.rank :: self.world_size]


class BatchLoader:
    """An iterable of (images, targets) batches, or of (images, targets, draws) for an augmentation.

    Images in memory are kept on the device and indexed by the whole batch there, so that a training step copies
    nothing; those in files are read by ``num_workers`` processes. The draws belong to seed, epoch and sample, so an
    augmented image depends on neither the processes, nor the workers, nor the device.

    Its state, which the Trainer keeps in a checkpoint, is how much of an epoch it has served: a run that is resumed
    amid an epoch goes on with the batch that comes next.

    Args:
        images: All images, [N, ...].
        targets: Their classes, [N].
        sampler: Which samples make which batch.
        num_draws: How many draws go with each sample, or None where there is no augmentation. They are integers,
            uniform below :data:`DRAWS`, since the Trainer's precision may round whatever is a float.
        num_workers: Processes that read batches ahead.
        device: Device of the batches. Batches of images that are read from files, or that take more than
            ``device_memory``, stay in pinned memory of the host, from where the Trainer copies them.
        device_memory: Bytes that the images may take on a device other than the CPU.
    """

    batch_sampler = None  # where there is a sampler, Lightning looks for this too
    dataset: Tensor  # Lightning's BatchSizeFinder stops at its length

    def __init__(
        self,
        images: ImageStore,
        targets: Tensor,
        sampler: BatchSampler,
        num_draws: int | None = None,
        num_workers: int = 0,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (a constant)
        device_memory: float = 0,
    ) -> None:
        self.images, self.targets, self.sampler = images, targets, sampler
        self.num_draws, self.num_workers = num_draws, num_workers
        self.device, self.device_memory = device, device_memory
        self._served = 0  # batches of this epoch
        self._resumed: dict[str, int] = {}
        self._on_device: Tensor | None = None

    def state_dict(self) -> dict[str, int]:
        """The epoch, how many batches of it were served, and their size."""
        return {"epoch": self.sampler.epoch, "served": self._served, "batch_size": self.sampler.batch_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Has that epoch, should it come, begin behind those batches."""
        self._resumed = state

    def __len__(self) -> int:
        return len(self.sampler)

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.images[index], self.targets[index], index

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        self._served = 0
        if self._resumed.get("epoch") == self.sampler.epoch:
            self._served, batch_size = self._resumed["served"], self._resumed["batch_size"]
            if batch_size != self.sampler.batch_size:
                raise InputError(
                    f"the run stopped amid an epoch of batches of {batch_size} and cannot go on with "
                    f"{self.sampler.batch_size}; set batch_size back."
                )
        shape = (len(self.targets), self.num_draws or 0)
        draws = torch.randint(DRAWS, shape, dtype=torch.int32, generator=self.sampler.generator(" draws"))
        indices = list(self.sampler)[self._served :]
        images = self._in_memory()
        batches = self._by_reading(indices, draws) if images is None else self._by_index(images, indices, draws)
        for batch in batches:
            self._served += 1
            yield batch if self.num_draws is not None else batch[:2]

    def _in_memory(self) -> ImageStore | None:
        """Return the images in the memory of the device, copied once; None if they are in files or too many."""
        store = self.images.store if isinstance(self.images, ImageSubset) else self.images
        if not isinstance(store, Tensor):
            return None
        if self.device.type == "cpu":
            return self.images
        if self._on_device is None and store[:1].nbytes * len(self.images) <= self.device_memory:
            self._on_device = self.images[torch.arange(len(self.images))].to(self.device)
        return self._on_device

    def _by_index(self, images: ImageStore, indices: list[Tensor], draws: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Index images on the device; what else a batch needs is put in order, and copied, once an epoch."""
        if not indices:
            return
        index = torch.cat(indices)
        columns = [column.to(self.device) for column in (index, self.targets[index], draws[index])]
        sizes = [len(index) for index in indices]
        for batch, targets, batch_draws in zip(*(torch.split(column, sizes) for column in columns), strict=True):
            yield images[batch], targets, batch_draws

    def _by_reading(self, indices: list[Tensor], draws: Tensor) -> Iterator[tuple[Tensor, ...]]:
        pin = self.device.type == "cuda"
        # with a generator of its own the loader takes no draw from the model's
        loader: DataLoader[Any] = DataLoader(
            self,  # type: ignore[arg-type] # indexed by batch, not by sample
            batch_size=None,
            sampler=indices,
            num_workers=self.num_workers,
            worker_init_fn=ignore_signals,
            pin_memory=pin,
            generator=torch.Generator(),
        )
        try:
            for images, targets, index in loader:
                batch_draws = draws[index]
                yield images, targets, batch_draws.pin_memory() if pin else batch_draws
        except DataError as error:  # a worker's comes with its traceback in the message
            raise DataError(worker_message(error)) from error
