"""Module of the checkpoints in this folder. For a new FORMAT, add the last.ckpt of this command, run in this folder:

python -m lsoftmax_lightning fit --config digits.yaml --model flat.Module --model.margin 3 --trainer.max_epochs 2
"""

from typing import Any

from torch import nn

from lsoftmax_lightning import ClassificationModule


class Flat(nn.Sequential):
    num_features = 8


class Module(ClassificationModule):
    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        layers = nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.PReLU()
        super().__init__(num_classes, backbone=Flat(*layers), **kwargs)
