"""Distributed strategies."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.imports import compare_version
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from typing_extensions import override

from .checkpoints import read
from .chunked_loss import is_plain_cross_entropy
from .compat import shard_over_all_ranks, synchronise_batch_norm
from .errors import InputError
from .heads import LSoftmaxLinear


class ClassShardedStrategy(ModelParallelStrategy):
    """Shard the weight of the head over all ranks by class, and all other parameters by FSDP2.

    Use it for hundreds of thousands of classes. Each rank stores only its shard of the weight, gradient and momentum,
    and processes its part of the global batch, as in DDP. The result is the same as on one rank. Batch normalisation
    is synchronised if the Trainer has ``sync_batchnorm``. Validation, test and prediction run on the gathered network.

    A checkpoint is a single file, as with other strategies; rank 0 assembles it in its memory. Training can resume from
    it on any number of ranks. Checkpoints are always read without running code: the Trainer's ``weights_only=False``
    has no effect.

    A LightningModule needs an :class:`~lsoftmax_lightning.LSoftmaxLinear` as its ``head``, and must compute the loss by
    :meth:`~lsoftmax_lightning.LSoftmaxLinear.cross_entropy`. A module that overrides ``configure_model`` shards itself.
    Its evaluation needs ``reshard_after_forward=False``, because ranks may have different numbers of batches.

    Args:
        **kwargs: ``process_group_backend`` and ``timeout`` of
            :class:`~lightning.pytorch.strategies.ModelParallelStrategy`.

    Raises:
        InputError: When the Trainer starts, if the module cannot be sharded.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **kwargs)

    @override
    def setup_environment(self) -> None:
        shard_over_all_ranks(self)
        super().setup_environment()
        if not self._is_sharded:  # FSDP2 would not manage layers that are replaced later
            synchronise_batch_norm(self, self._module)

    @override
    def setup(self, trainer: Trainer) -> None:
        _check_settings(trainer, self._module)
        if is_overridden("configure_model", self._module):
            _check_all_are_sharded(self._module)
            super().setup(trainer)
        else:
            if not self._is_sharded:
                self._shard()
            super(ModelParallelStrategy, self).setup(trainer)  # ModelParallelStrategy requires configure_model
        self._broadcast_buffers()

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _is_sharded(self) -> bool:
        return any(isinstance(parameter, DTensor) for parameter in self._module.parameters())

    def _shard(self) -> None:
        """Shard the head by class, and all other parts by FSDP2."""
        module = self._module
        head = getattr(module, "head", None)
        if not isinstance(head, LSoftmaxLinear):
            raise InputError(
                f"ClassShardedStrategy: `head` of {type(module).__name__} must be an LSoftmaxLinear, got "
                f"{type(head).__name__}; set it, or override configure_model."
            )
        names = {parameter: name for name, parameter in module.named_parameters()}
        known, parts = set(head.parameters()), []
        for part in _parts(module):
            own = dict.fromkeys(part.parameters())
            if own.keys() <= known:  # another name of a part, or no parameters
                continue
            if shared := own.keys() & known:
                raise InputError(
                    "ClassShardedStrategy: child modules must not share parameters, got "
                    f"{min(names[parameter] for parameter in shared)} in several; register each module once."
                )
            known |= own.keys()
            parts.append(part)
        for parameter, name in names.items():
            if parameter not in known:
                raise InputError(
                    "ClassShardedStrategy: every parameter must belong to a child module with a `forward`, got "
                    f"{name} in none; move it into one."
                )
            if parameter.is_meta:
                raise InputError(
                    f"ClassShardedStrategy: every parameter must have values, got {name} on the meta device; create "
                    "the module without `empty_init`."
                )
        mesh = self.device_mesh["data_parallel"]
        head.shard(mesh)
        for part in parts:
            fully_shard(part, mesh=mesh, reshard_after_forward=False)

    @override
    def on_validation_start(self) -> None:
        # Ranks may have different numbers of batches, so every rank evaluates the whole network.
        with torch.inference_mode(False):  # training continues with these parameters
            for part in self._module.modules():
                if isinstance(part, LSoftmaxLinear):
                    part.free_full_weight()  # of an earlier step
                if isinstance(part, FSDPModule):
                    part.unshard()
        self._broadcast_buffers()  # batch statistics differ between ranks

    def _broadcast_buffers(self) -> None:
        for buffer in self._module.buffers():
            dist.broadcast(buffer, src=0)

    @override
    def on_validation_end(self) -> None:
        for part in self._module.modules():
            if isinstance(part, LSoftmaxLinear):
                part.free_full_weight()
            elif isinstance(part, FSDPModule):
                part.reshard()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True  # by load_optimizer_state_dict

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self._gathered(self._module.state_dict())

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return self._gathered(optimizer.state_dict())

    def _gathered(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the state with full tensors on rank 0, and an empty state on the other ranks.

        The base class calls torch's ``get_optimizer_state_dict``, which first steps an optimizer without state. With
        weight decay, this changes the momentum.
        """

        def gather(value: DTensor) -> Tensor | None:
            full = value.full_tensor()
            return full.cpu() if self.is_global_zero else None

        gathered: dict[str, Any] = apply_to_collection(state, DTensor, gather)
        return gathered if self.is_global_zero else {}

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return read(checkpoint_path)  # mapped into memory: a rank holds one full tensor at a time

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        current = self._module.state_dict()
        state = {name: _sharded_like(value, current.get(name)) for name, value in checkpoint["state_dict"].items()}
        self._module.load_state_dict(state, strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            indices = [index for group in state["param_groups"] for index in group["params"]]
            by_index = dict(zip(indices, parameters, strict=True))
            values = {
                index: {name: _sharded_like(value, by_index[index]) for name, value in values.items()}
                for index, values in state["state"].items()
            }
            optimizer.load_state_dict(state | {"state": values})


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the child modules that have a ``forward``, also those in modules without one, such as ``ModuleList``."""
    for child in module.children():
        if type(child).forward is nn.Module.forward:
            yield from _parts(child)
        else:
            yield child


def _check_settings(trainer: Trainer, module: LightningModule) -> None:
    """Reject settings that would silently train incorrectly, or fail late."""
    if dist.get_backend() == "gloo" and compare_version("torch", operator.lt, "2.9"):
        raise InputError(
            f"ClassShardedStrategy: the gloo backend requires torch>=2.9, got {torch.__version__}; upgrade torch. "
            "Earlier versions sum gradients instead of averaging them (pytorch#162338)."
        )
    criterion = getattr(module, "criterion", None)
    if criterion is not None and not is_plain_cross_entropy(criterion):
        raise InputError(
            f"criterion: must be nn.CrossEntropyLoss with default weight, reduction and ignore_index, got {criterion}; "
            "use another strategy for other losses."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            raise InputError(
                f"ClassShardedStrategy: cannot average sharded weights, got {type(callback).__name__}; remove it, or "
                "use another strategy."
            )


def _check_all_are_sharded(module: LightningModule) -> None:
    """Reject parameters that the ``configure_model`` of a user left out: the ranks would train different ones."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            raise InputError(
                f"configure_model: must shard every trained parameter, got {name} unsharded; call fully_shard on its "
                "module, or shard on an LSoftmaxLinear."
            )


def _sharded_like(value: Any, current: Any) -> Any:
    """Return a tensor sharded like the current tensor of the same shape, and any other value unchanged."""
    if isinstance(current, DTensor) and isinstance(value, Tensor) and value.shape == current.shape:
        return distribute_tensor(value, current.device_mesh, current.placements)
    return value
