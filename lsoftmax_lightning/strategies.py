"""How the processes of a run divide the work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from .checkpoints import read
from .errors import InputError


class ClassShardedStrategy(ModelParallelStrategy):
    """Divides the weight of the head by class over all processes, and batches as DDP does.

    For classes by the hundred thousand: of weight, gradient and momentum each process keeps those of its share of the
    classes. The weights come out as on one process. Batch normalisation is synchronised where the Trainer is told to.
    A checkpoint is one file, as of any other run, from which any number of processes goes on; the first process puts it
    together in its memory.

    Args:
        **kwargs: ``process_group_backend`` and ``timeout`` of
            :class:`~lightning.pytorch.strategies.ModelParallelStrategy`.

    Raises:
        InputError: When the Trainer starts, if the module cannot be divided.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **kwargs)

    def setup_environment(self) -> None:
        """Divides over all processes there are."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        sharded = any(isinstance(parameter, DTensor) for parameter in self._module.parameters())
        if self._layer_sync is not None and not sharded:  # Lightning leaves it out; FSDP2 would not know new layers
            self._layer_sync.apply(self._module)
        if not is_overridden("configure_model", self._module):
            shard = getattr(self._module, "shard", None)
            if shard is None:
                raise InputError(
                    f"ClassShardedStrategy asks a module to divide itself, by `shard`, as modules of ours do, or by "
                    f"`configure_model`; {type(self._module).__name__} has neither."
                )
            self._module.configure_model = shard  # type: ignore[method-assign]  # which Lightning calls

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def lightning_restore_optimizer(self) -> bool:
        """That the state of the optimiser is put back by :meth:`load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole state of the module, on the first process."""
        return self._whole(self._module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state of an optimiser, on the first process."""
        return self._whole(optimizer.state_dict())

    def _whole(self, state: dict[str, Any]) -> dict[str, Any]:
        whole: dict[str, Any] = tree_map(self._gathered, state)
        return whole if self.is_global_zero else {}

    def _gathered(self, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        whole = value.full_tensor()
        return whole.cpu() if self.is_global_zero else None

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of one file; each rank takes into memory only its shard."""
        return read(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Divides the state of a module."""
        own = self._module.state_dict()
        divided = {name: _divided(value, own.get(name)) for name, value in checkpoint["state_dict"].items()}
        self._module.load_state_dict(divided, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Divides the state of the optimisers."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            of = dict(zip(numbers, parameters, strict=True))
            values = {
                number: {name: _divided(value, of[number]) for name, value in values.items()}
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict(state | {"state": values})


def _divided(value: Any, own: Any) -> Any:
    """What is of the shape of a divided tensor, divided in the same way."""
    if isinstance(own, DTensor) and isinstance(value, Tensor) and value.shape == own.shape:
        return distribute_tensor(value, own.device_mesh, own.placements)
    return value
