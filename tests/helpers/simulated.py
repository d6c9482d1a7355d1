"""Simulated accelerator: computes on the CPU, checks devices as a GPU does, and records waits with their lines.

Importing it registers a device type ``sim`` with torch permanently, so import it only in a separate process.
"""

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.utils.backend_registration as registration
from lightning.pytorch.accelerators import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

WAITS: Counter[str] = Counter()
"""Operations that make the host wait, with their lines."""
KERNELS: Counter[str] = Counter()
"""Operations that start a kernel."""

_NO_KERNEL = (
    "view",
    "t",
    "detach",
    "unsqueeze",
    "squeeze",
    "expand",
    "slice",
    "select",
    "transpose",
    "alias",
    "split",
    "as_strided",
    "permute",
    "_unsafe_view",
    "diagonal",
    "unbind",
    "empty",
    "empty_like",
    "new_empty",
    "lift_fresh",
    "_reshape_alias",
    "empty_strided",
    "split_with_sizes",
    "record_stream",
    "set_",
)
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "bincount")


class _Backend(registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_available(self) -> bool:
        return True

    def get_rng_state(self, *args: Any) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def get_rng_state_all(self, *args: Any) -> list[torch.Tensor]:
        return []

    def is_autocast_enabled(self) -> bool:
        return torch._C._is_any_autocast_enabled()

    def set_device(self, *args: Any) -> None: ...

    manual_seed = manual_seed_all = set_rng_state = set_rng_state_all = synchronize = empty_cache = set_device


registration._setup_privateuseone_for_python_backend("sim", _Backend())
SIM = torch.device("sim", 0)


def _autocast_as_cuda() -> list[torch.library.Library]:
    """Cast the inputs of matrix products and convolutions as autocast does on CUDA; change nothing else."""
    fallthrough = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    fallthrough.fallback(torch.library.fallthrough_kernel)
    casts = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(value: Any) -> Any:
        low = isinstance(value, torch.Tensor) and value.device.type == "sim" and value.dtype == torch.float32
        return value.to(torch.get_autocast_dtype("sim")) if low else value

    def register(name: str) -> None:
        operation = getattr(torch.ops.aten, name).default

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(key):
                return operation(*tree_map(cast, args), **tree_map(cast, kwargs))

        casts.impl(name, run)

    for name in ("linear", "mm", "addmm", "conv2d", "prelu"):
        register(name)
    return [fallthrough, casts]


_LIBRARIES = _autocast_as_cuda()  # kept alive, because they unregister when they are deleted


class Event:
    """Replacement for ``torch.Event``: the device has always finished."""

    def __init__(self, *args: Any) -> None: ...

    record = synchronize = __init__


torch.Event = Event  # type: ignore[misc,assignment]


class Simulated(torch.Tensor):
    """Tensor on the simulated device; its values are in ``raw``, on the CPU."""

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor, requires_grad: bool = False) -> "Simulated":
        tensor: Simulated = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            layout=raw.layout,
            device=SIM,
            requires_grad=requires_grad,
        )
        tensor.raw = raw
        return tensor

    def __init__(self, *args: Any) -> None: ...

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Simulated, (self.raw, self.requires_grad)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Mode in which tensors can be created on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat, _ = tree_flatten((args, kwargs or {}))
        simulated = any(isinstance(value, Simulated) or _is_sim(value) for value in flat)
        return _dispatch(func, args, kwargs or {}) if simulated else func(*args, **(kwargs or {}))


def _is_sim(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == "sim"


def _where() -> str:
    """Return the innermost line of this package, or else of a library, on the stack."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    for package in ("lsoftmax_lightning/", "torchmetrics/", "lightning/"):
        for frame in reversed(frames):
            if package in frame.filename and "/tests/" not in frame.filename:
                return f"{Path(frame.filename).name}:{frame.lineno}"
    return "?"


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    flat, _ = tree_flatten((args, kwargs))
    simulated = [value for value in flat if isinstance(value, Simulated)]
    on_cpu = [value for value in flat if isinstance(value, torch.Tensor) and not isinstance(value, Simulated)]
    devices = [value for value in flat if isinstance(value, torch.device)]
    to_sim = _is_sim(devices[0]) if devices else bool(simulated)
    copies = name in ("copy_", "_to_copy", "_copy_from", "set_")

    if simulated and not copies and any(tensor.ndim for tensor in on_cpu):
        if not name.startswith(("index", "_index_put", "_unsafe_index")) or not isinstance(args[0], Simulated):
            raise RuntimeError(f"{name} of tensors on two devices at {_where()}")
        WAITS[f"copy of an index to the device at {_where()}"] += 1
    if name not in _NO_KERNEL:
        KERNELS[name] += 1
    if simulated and name in _WAITING:
        WAITS[f"{name} at {_where()}"] += 1
    if simulated and name.startswith("index") and isinstance(args[1], (list, tuple)):
        masks = [index for index in args[1] if isinstance(index, torch.Tensor) and index.dtype == torch.bool]
        if masks:
            WAITS[f"index by a mask at {_where()}"] += 1
    moves = name == "_to_copy" and bool(devices) and bool(simulated) != to_sim
    if moves and (to_sim or not kwargs.get("non_blocking")):
        WAITS[f"copy {'to' if to_sim else 'from'} the device at {_where()}"] += 1
    if name == "copy_" and isinstance(args[0], Simulated) != isinstance(args[1], Simulated) and args[1].ndim:
        WAITS[f"copy in place between devices at {_where()}"] += 1

    def unwrapped(value: Any) -> Any:
        if _is_sim(value):
            return torch.device("cpu")
        return value.raw if isinstance(value, Simulated) else value

    if devices and to_sim:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        kwargs.pop("pin_memory", None)
    raw_args, raw_kwargs = tree_map(unwrapped, (args, kwargs))
    if moves:  # never shares memory
        raw_kwargs.pop("device", None)
        found = func(*raw_args, **raw_kwargs).clone()
    else:
        found = func(*raw_args, **raw_kwargs)
    if not to_sim:
        return found
    found = tree_map(lambda value: Simulated(value) if type(value) is torch.Tensor else value, found)
    return return_and_correct_aliasing(func, args, kwargs, found) if simulated and not copies else found


class SimulatedAccelerator(Accelerator):
    """Accelerator of the simulated device for a Trainer."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [SIM]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "sim"

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}
