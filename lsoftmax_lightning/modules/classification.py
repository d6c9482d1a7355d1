"""Image classification with an L-Softmax head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from ..backbones.modes import evaluation_mode
from ..compat import current_datamodule
from ..data_spec import DataSpec
from ..errors import InputError
from ..functional import gather_target_logits
from ..geometry import target_angles
from ..metrics import MeanLoss
from ..pairs import pairs_of
from .base import LSoftmaxModule


class Classification(NamedTuple):
    """Predicted classes of images.

    Args:
        names: Name of the predicted class of each image; its index, if it has none.
        probabilities: Probability of this class, float32, ``(N,)``.
    """

    names: list[str]
    probabilities: Tensor


class ClassificationModule(LSoftmaxModule):
    """Classifies images; logs loss and accuracy of the plain logits as ``val/loss``, ``val/acc`` and so for test.

    Arguments and the way to subclass are those of :class:`LSoftmaxModule`.

    Attributes:
        top_k: Number of classes to predict for each image. Default: 1.

    Example:
        >>> from lsoftmax_lightning import ClassificationModule
        >>> model = ClassificationModule(num_classes=10, backbone="mnist", margin=4, image_shape=(1, 28, 28))
        >>> model.head
        LSoftmaxLinear(in_features=256, num_classes=10, margin=4, lambda_=0)
    """

    top_k = 1

    def setup(self, stage: str) -> None:
        """Reject datamodules of image pairs, whose image indices would be taken for classes."""
        if pairs_of(current_datamodule(self.trainer), "val") is not None:
            raise InputError("these data validate on pairs of images: train a VerificationModule on them.")

    def configure_metrics(self) -> None:
        """Add ``val_metrics`` and ``test_metrics``, of plain logits (N, C) and classes (N,), and the mean losses."""
        super().configure_metrics()
        self.val_metrics = self.train_metrics.clone(prefix="val/")
        self.test_metrics = self.train_metrics.clone(prefix="test/")
        self.val_loss, self.test_loss = MeanLoss(), MeanLoss()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Update the validation metrics."""
        self._evaluate(batch, "val/loss", self.val_loss, self.val_metrics)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Update the test metrics."""
        self._evaluate(batch, "test/loss", self.test_loss, self.test_metrics)

    def _evaluate(
        self, batch: tuple[Tensor, Tensor], loss_name: str, loss: MeanLoss, metrics: MetricCollection
    ) -> None:
        x, target = batch
        logits = self(x)
        _, target = gather_target_logits(logits, target)
        loss.update(self.criterion(logits, target), len(target))
        metrics.update(logits, target)
        self.log(loss_name, loss, prog_bar=True)
        self.log_dict(metrics, prog_bar=True)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return predictions for images or (images, classes), N of each.

        Returns:
            ``prediction``, the predicted class; its ``probability``; ``angle`` of the sample to the weight of this
            class, in degrees; ``embedding``, (N, D); and for k = 2 to ``top_k``, ``prediction_k`` and
            ``probability_k`` of the class with the k-th highest probability.
        """
        embedding = self.embed(batch[0] if isinstance(batch, (tuple, list)) else batch)
        probability, prediction = self.head(embedding).softmax(dim=1).topk(min(self.top_k, self.num_classes))
        angle = target_angles(embedding, self.head.full_weight[prediction[:, 0]])
        outputs = {"prediction": prediction[:, 0], "probability": probability[:, 0], "angle": angle}
        for k in range(1, prediction.shape[1]):
            outputs |= {f"prediction_{k + 1}": prediction[:, k], f"probability_{k + 1}": probability[:, k]}
        return {**outputs, "embedding": embedding}

    @torch.inference_mode()
    def classify(self, images: Tensor) -> Classification:
        """Return the class name and its probability for images as they are in a file.

        The images are normalised as in the training, and the network is in evaluation mode, whatever its mode is before
        and after the call. Class names and normalisation are those of ``data_spec``, which a checkpoint holds.

        Args:
            images: Images, uint8, (N, channels, height, width), of the size of the training images;
                :func:`~lsoftmax_lightning.datamodules.images.read_image` reads one from a file.

        Raises:
            InputError: If the images are of another type or size, or the checkpoint does not describe its data.

        Example:
            >>> model = ClassificationModule.load_from_checkpoint("best.ckpt")  # doctest: +SKIP
            >>> names, probabilities = model.classify(images)  # doctest: +SKIP
        """
        if self.data_spec is None:
            self._store_data_spec()
        spec = self.data_spec or DataSpec()
        spec.require("class_names", "image_shape", "mean", "std")
        normalized = spec.normalize(images.to(self.head.weight.device)).to(self.head.weight.dtype)
        with evaluation_mode(self):
            outputs = self.predict_step(normalized, 0)
        known = dict(enumerate(spec.class_names))
        names = [known.get(index, str(index)) for index in outputs["prediction"].tolist()]
        return Classification(names, outputs["probability"].float())
