"""Image classification with an L-Softmax head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from typing_extensions import override

from ..backbones.modes import evaluation_mode
from ..compat import current_datamodule, trainer_of
from ..data_spec import DataSpec
from ..errors import InputError
from ..functional import gather_target_logits
from ..geometry import target_angles
from ..metrics import MeanLoss, loss_weight
from ..pairs import pairs_of
from .base import LSoftmaxModule


class Classification(NamedTuple):
    """Predicted classes of images."""

    names: list[str]
    """Name of the predicted class of each image, or its index if the class has no name."""
    probabilities: Tensor
    """Probability of the predicted class, float32, ``(N,)``."""


class ClassificationModule(LSoftmaxModule):
    """Image classifier; logs loss and accuracy of the plain logits as ``val/loss``, ``val/acc``, and likewise for test.

    For the arguments, and the methods to override, see :class:`LSoftmaxModule`.

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
        """Reject datamodules of image pairs, whose batches contain image indices instead of classes.

        Raises:
            InputError: If the datamodule has validation pairs.
        """
        if pairs_of(current_datamodule(self.trainer), "val") is not None:
            raise InputError(
                "data: validation on image pairs needs a VerificationModule, got ClassificationModule; change model."
            )

    def configure_metrics(self) -> None:
        """Add ``val_metrics`` and ``test_metrics``, of plain logits (N, C) and classes (N,), and the mean losses."""
        super().configure_metrics()
        self.val_metrics = self.train_metrics.clone(prefix="val/")
        self.test_metrics = self.train_metrics.clone(prefix="test/")
        self.val_loss, self.test_loss = MeanLoss(), MeanLoss()

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val/loss", self.val_loss, self.val_metrics)

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test/loss", self.test_loss, self.test_metrics)

    def _evaluate(
        self, batch: tuple[Tensor, Tensor], loss_name: str, loss: MeanLoss, metrics: MetricCollection
    ) -> None:
        trainer = trainer_of(self)
        if trainer is not None and len(trainer.num_test_batches if trainer.testing else trainer.num_val_batches) > 1:
            raise InputError(
                "dataloaders: must be one, because the metrics are those of all images together, got several; evaluate "
                "each by a call of its own, or override validation_step and test_step, with metrics for each."
            )
        x, target = batch
        logits = self(x)
        _, target = gather_target_logits(logits, target)
        loss.update(self.criterion(logits, target), loss_weight(self.criterion, target))
        metrics.update(logits, target)
        self.log(loss_name, loss, prog_bar=True)
        self.log_dict(metrics, prog_bar=True)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Predict the classes of a batch.

        Args:
            batch: Images (N, channels, height, width), or a tuple that begins with them.
            batch_idx: Not used.

        Returns:
            ``prediction``, the predicted class, (N,); ``probability`` of this class, (N,); ``angle`` between the sample
            and the weight of this class in degrees, (N,); for k = 2 to ``top_k``, ``prediction_k`` and
            ``probability_k`` of the class with the k-th highest probability; and ``embedding``, (N, D).
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
        """Predict class names and probabilities of images that are not normalised.

        The images are normalised as in training. The network runs in evaluation mode, and its mode is restored after
        the call. Class names and normalisation are those of ``data_spec``, which a checkpoint contains.

        Args:
            images: uint8, (N, channels, height, width), of the size of the training images.
                :func:`~lsoftmax_lightning.datamodules.images.read_image` reads one image from a file.

        Raises:
            InputError: If the images have another dtype or size, or ``data_spec`` is not complete.

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
