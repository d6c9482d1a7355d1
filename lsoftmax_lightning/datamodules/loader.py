"""Batches of images in memory or in files, distributed over ranks."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..compat import end_workers
from ..errors import DataError, InputError
from ..library_messages import worker_message
from ..seeds import hashed_seed
from ..signals import ignore_signals, signals_blocked
from .images import ImageStore, ImageSubset

DRAW_SCALE = 2**24
"""Upper bound of draws, exclusive. A draw divided by it is exact in float32 and uniform on [0, 1)."""


def seeded_generator(key: str) -> torch.Generator:
    """Return a generator with a seed made from ``key`` (:func:`~lsoftmax_lightning.seeds.hashed_seed`)."""
    return torch.Generator().manual_seed(hashed_seed(key))


@dataclass(eq=False)
class GlobalBatchSampler:
    """Sampler of the part of each global batch that belongs to this rank, as index tensors.

    The global batches depend only on seed and epoch, so they are the same for any number of ranks. No sample is
    repeated to pad the batches of a rank.

    Args:
        num_samples: Number of samples.
        batch_size: Global batch size.
        shuffle: Whether to shuffle the samples, in a different order each epoch.
        drop_last: Whether to drop an incomplete last batch, as training does: its mean gradient over several ranks
            would differ from that on one rank.
        rank: Global rank.
        world_size: Number of ranks.
        seed: Seed of the shuffle.

    Raises:
        InputError: If ``batch_size`` is not divisible by ``world_size``, or there are fewer samples than ``batch_size``
            (with ``drop_last``) or than ranks.
    """

    num_samples: int
    batch_size: int
    shuffle: bool
    drop_last: bool
    rank: int
    world_size: int
    seed: int
    epoch: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.batch_size % self.world_size:
            raise InputError(
                f"batch_size: is global and must be divisible by the number of devices ({self.world_size}), got "
                f"{self.batch_size}; use {self.batch_size // self.world_size * self.world_size or self.world_size}."
            )
        if self.drop_last and self.num_samples < self.batch_size:
            raise InputError(
                f"batch_size: must be at most the {self.num_samples} samples, got {self.batch_size}; lower it."
            )
        if not self.drop_last and self.num_samples < self.world_size:
            raise InputError(
                f"devices: must be at most the {self.num_samples} samples, got {self.world_size}; use fewer."
            )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the shuffle. The Trainer calls this method before each epoch."""
        self.epoch = epoch

    def generator(self, purpose: str = "") -> torch.Generator:
        """Return a generator for this epoch and purpose, with the same seed on every rank."""
        return seeded_generator(f"{self.seed} {self.epoch}{purpose}")

    def __len__(self) -> int:
        num_full_batches, remainder = divmod(self.num_samples, self.batch_size)
        return num_full_batches + (not self.drop_last and self.rank < remainder)

    def __iter__(self) -> Iterator[Tensor]:
        if self.shuffle:
            order = torch.randperm(self.num_samples, generator=self.generator())
        else:
            order = torch.arange(self.num_samples)
        for batch in torch.split(order, self.batch_size)[: len(self)]:
            yield batch[self.rank :: self.world_size]


class BatchLoader:
    """Iterable of batches (images, targets), or (images, targets, draws) for an augmentation.

    Images in memory are copied to the device once and indexed there, so a training step copies no images. Image files
    are read by ``num_workers`` processes. The draws depend only on seed, epoch and sample, so an augmented image is the
    same for any number of ranks and workers and on any device.

    A checkpoint contains the state of the loader: the number of batches served in the epoch. A run that resumes within
    an epoch continues with the next batch.

    Args:
        images: Images, ``(N, C, H, W)``.
        targets: Class of each image, ``(N,)``.
        sampler: Sampler of the indices of each batch.
        num_draws: Number of draws per sample; None without an augmentation. The draws are integers, uniform from 0 to
            below :data:`DRAW_SCALE`, because the Trainer's precision may round floating-point tensors.
        num_workers: Number of processes that read batches ahead.
        device: Device of the batches. If the images are in files, or larger than ``device_memory``, the batches stay in
            pinned host memory, and the Trainer copies them.
        device_memory: Largest size in bytes of images on a device other than the CPU.
    """

    batch_sampler = None  # Lightning reads this attribute of loaders with a sampler
    dataset: Tensor  # its length limits Lightning's BatchSizeFinder

    def __init__(
        self,
        images: ImageStore,
        targets: Tensor,
        sampler: GlobalBatchSampler,
        num_draws: int | None = None,
        num_workers: int = 0,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (a constant)
        device_memory: float = 0,
    ) -> None:
        self.images = images
        self.targets = targets
        self.sampler = sampler
        self.num_draws = num_draws
        self.num_workers = num_workers
        self.device = device
        self.device_memory = device_memory
        self._num_served = 0  # batches of this epoch
        self._resume_state: dict[str, int] = {}
        self._on_device: Tensor | None = None

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the number of batches served in it, and the batch size."""
        return {"epoch": self.sampler.epoch, "served": self._num_served, "batch_size": self.sampler.batch_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip the served batches of a state when its epoch is iterated next.

        Args:
            state: Result of :meth:`state_dict`.
        """
        self._resume_state = state

    def __len__(self) -> int:
        return len(self.sampler)

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.images[index], self.targets[index], index

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        self._num_served = 0
        if self._resume_state.get("epoch") == self.sampler.epoch:
            self._num_served = self._resume_state["served"]
            batch_size = self._resume_state["batch_size"]
            if batch_size != self.sampler.batch_size:
                raise InputError(
                    f"batch_size: must be {batch_size} to resume this run within an epoch, got "
                    f"{self.sampler.batch_size}; use {batch_size}."
                )
        shape = (len(self.targets), self.num_draws or 0)
        draws = torch.randint(DRAW_SCALE, shape, dtype=torch.int32, generator=self.sampler.generator(" draws"))
        indices = list(self.sampler)[self._num_served :]
        images = self._images_on_device()
        batches = self._read_batches(indices, draws) if images is None else self._index_batches(images, indices, draws)
        for batch in batches:
            self._num_served += 1
            yield batch if self.num_draws is not None else batch[:2]

    def _images_on_device(self) -> ImageStore | None:
        """Return the images on the device, copied there once; None if they are in files or too large."""
        store = self.images.store if isinstance(self.images, ImageSubset) else self.images
        if not isinstance(store, Tensor):
            return None
        if self.device.type == "cpu":
            return self.images
        if self._on_device is None and store[:1].nbytes * len(self.images) <= self.device_memory:
            self._on_device = self.images[torch.arange(len(self.images))].to(self.device)
        return self._on_device

    def _index_batches(self, images: ImageStore, indices: list[Tensor], draws: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Index images on the device; indices, targets and draws are ordered by batch and copied once per epoch."""
        if not indices:
            return
        index = torch.cat(indices)
        columns = [column.to(self.device) for column in (index, self.targets[index], draws[index])]
        sizes = [len(index) for index in indices]
        for batch, targets, batch_draws in zip(*(torch.split(column, sizes) for column in columns), strict=True):
            yield images[batch], targets, batch_draws

    def _read_batches(self, indices: list[Tensor], draws: Tensor) -> Iterator[tuple[Tensor, ...]]:
        pin = self.device.type == "cuda"
        # the generator keeps the loader from drawing from the global one
        loader: DataLoader[Any] = DataLoader(
            self,  # type: ignore[arg-type] # indexed by batch, not by sample
            batch_size=None,
            sampler=indices,
            num_workers=self.num_workers,
            worker_init_fn=ignore_signals,
            pin_memory=pin,
            generator=torch.Generator(),
        )
        with signals_blocked():
            batches = iter(loader)  # starts the workers
        end = partial(end_workers, batches)
        atexit.register(end)  # Python terminates workers at exit and waits for them, but they ignore SIGTERM
        try:
            for images, targets, index in batches:
                batch_draws = draws[index]
                yield images, targets, batch_draws.pin_memory() if pin else batch_draws
        except DataError as error:  # the message from a worker contains its traceback
            raise DataError(worker_message(error)) from error
        finally:
            end()
            atexit.unregister(end)
