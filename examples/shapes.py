"""Your own project: a datamodule, a network and a subclass of ClassificationModule, each in a few lines.

Run: python shapes.py
 or: python -m lsoftmax_lightning fit --config shapes.yaml   (the config names the classes below by class_path)
"""

from typing import Any

import torch
from lightning import Trainer, seed_everything
from torch import Tensor, nn
from torchmetrics.classification import MulticlassF1Score

from lsoftmax_lightning import ClassificationModule
from lsoftmax_lightning.callbacks import MarginMonitor
from lsoftmax_lightning.datamodules import ImageDataModule
from lsoftmax_lightning.datamodules.base import Images


class ShapesDataModule(ImageDataModule):
    """Noisy images of 16x16 pixels with a square, a cross or a frame. Your datamodule would read files instead."""

    class_names = ("square", "cross", "frame")
    image_shape = (1, 16, 16)
    mean = (0.25,)
    std = (0.2,)

    def load(self, train: bool) -> Images:
        """Return 1,000 training images or 300 test images."""
        generator = torch.Generator().manual_seed(int(train))
        shapes = torch.zeros(3, 7, 7)
        shapes[0] = 1
        shapes[1, 3], shapes[1, :, 3] = 1, 1
        shapes[2] = 1
        shapes[2, 1:-1, 1:-1] = 0
        targets = torch.arange(1000 if train else 300) % 3
        images = 100 * torch.rand(len(targets), 1, 16, 16, generator=generator)
        for image, shape in zip(images, shapes[targets], strict=True):
            row, column = torch.randint(10, (2,), generator=generator).tolist()
            image[0, row : row + 7, column : column + 7] += 100 * shape
        return Images(images.to(torch.uint8), targets)


class TinyNet(nn.Module):
    """A network with the interface of timm: the feature width is ``num_features``; 0 classes mean no classifier.

    You can use ``timm.create_model("resnet18", num_classes=0, in_chans=1)`` instead.
    """

    def __init__(self, num_classes: int = 0, in_chans: int = 1, width: int = 16) -> None:
        super().__init__()
        self.num_features = 4 * width
        layers: list[nn.Module] = []
        for before, after in ((in_chans, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the feature maps, (N, num_features, H, W)."""
        maps: Tensor = self.features(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled features, (N, num_features)."""
        features: Tensor = self.fc(self.forward_features(x).amax(dim=(2, 3)))
        return features


class ShapesModule(ClassificationModule):
    """ClassificationModule with this network, and with the F1 score as a second metric."""

    def __init__(self, num_classes: int, width: int = 16, **kwargs: Any) -> None:
        super().__init__(num_classes, backbone=TinyNet(width=width), **kwargs)

    def configure_metrics(self) -> None:
        """Add the F1 score to training, validation and test."""
        super().configure_metrics()
        for metrics in (self.train_metrics, self.val_metrics, self.test_metrics):
            metrics.add_metrics({"f1": MulticlassF1Score(self.num_classes)})


def main() -> None:
    """Train and test."""
    seed_everything(0)
    data = ShapesDataModule(batch_size=50)
    model = ShapesModule(data.num_classes, margin=3)
    trainer = Trainer(max_epochs=4, accelerator="cpu", log_every_n_steps=5, callbacks=[MarginMonitor()])
    trainer.fit(model, data)
    trainer.test(model, data)


if __name__ == "__main__":
    main()
