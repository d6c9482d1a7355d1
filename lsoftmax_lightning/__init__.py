"""Large-Margin Softmax (Liu et al., ICML 2016) for PyTorch Lightning."""

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = version("lsoftmax-lightning")
__all__ = ["ClassificationModule", "LSoftmaxLinear", "LSoftmaxModule", "VerificationModule", "__version__"]

if TYPE_CHECKING:
    from .heads import LSoftmaxLinear
    from .modules import ClassificationModule, LSoftmaxModule, VerificationModule
else:  # hidden from mypy, which accepts any attribute of a module with `__getattr__`
    _HOMES = {
        "ClassificationModule": "modules",
        "LSoftmaxLinear": "heads",
        "LSoftmaxModule": "modules",
        "VerificationModule": "modules",
    }

    def __getattr__(name: str) -> Any:
        """Import a class or module of the package at its first use: the package itself does not import torch."""
        if name in _HOMES:
            value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
            globals()[name] = value
            return value
        if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
            return import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
