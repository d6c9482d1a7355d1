"""Large-Margin Softmax (Liu et al., ICML 2016) for PyTorch Lightning."""

from importlib.metadata import version

from .heads import LSoftmaxLinear
from .modules import ClassificationModule, LSoftmaxModule, VerificationModule

__version__ = version("lsoftmax-lightning")
__all__ = ["ClassificationModule", "LSoftmaxLinear", "LSoftmaxModule", "VerificationModule", "__version__"]
