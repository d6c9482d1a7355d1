"""Face verification with an L-Softmax head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from ..compat import current_datamodule
from ..data_spec import DataSpec
from ..errors import InputError
from ..metrics import PairVerification
from ..pairs import Pairs, pairs_of
from .base import LSoftmaxModule


class VerificationModule(LSoftmaxModule):
    """Face verification: training as a classifier of identities, validation and test on pairs of images.

    Validation and test batches are (images, image indices), each image once. The Trainer's datamodule must have
    ``val_pairs`` and ``test_pairs``, the :class:`~lsoftmax_lightning.pairs.Pairs` of these indices. The metrics of
    :class:`~lsoftmax_lightning.metrics.PairVerification` are logged as ``val/acc``, ``val/auc`` and so on, and
    likewise for test. There is no ``val/loss``, because the people in the pairs are not classes of the training.

    Args:
        num_classes: Number of identities. The command line takes it from the data.
        backbone: Name of a network, or any module from images to features (N, D) with D in its attribute
            ``num_features``.
        pca_components: Number of principal components of the embeddings, as in the paper (section 5). Default: no PCA.
        mirror: Whether to average the embeddings of each image and its mirror image.
        **kwargs: As :class:`LSoftmaxModule`.

    Raises:
        InputError: If a setting is out of range, or the parts do not fit together.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str | nn.Module,
        pca_components: int | None = None,
        mirror: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, backbone, **kwargs)
        self.pca_components, self.mirror = pca_components, mirror
        if pca_components is not None and not 1 <= pca_components <= self.head.in_features:
            raise InputError(
                f"pca_components: must be from 1 to {self.head.in_features}, the number of features, got "
                f"{pca_components}; set another number, or null for no PCA."
            )

    def compared_data(self, training: bool) -> DataSpec:
        """Return the specification that data must match; an evaluation is on other people, so it has no classes."""
        spec = super().compared_data(training)
        return spec if training else spec._replace(class_names=())

    def configure_verification(self, pairs: Pairs) -> PairVerification:
        """Return the metric of an evaluation on ``pairs``."""
        return PairVerification(pairs, self.pca_components)

    def embed(self, images: Tensor) -> Tensor:
        """Compute embeddings (N, D) of images; if ``mirror``, averaged with those of the mirror images."""
        features = self.forward_features(images)
        return (features + self.forward_features(images.flip(3))) / 2 if self.mirror else features

    @override
    def on_validation_epoch_start(self) -> None:
        self._create_metric("val")

    @override
    def on_test_epoch_start(self) -> None:
        self._create_metric("test")

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, image_ids = batch
        self.verification.update(self.embed(images), image_ids)

    test_step = validation_step

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_metric("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_metric("test")

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the ``embedding`` (N, D) of a batch of images, or of a tuple that begins with images."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        return {"embedding": self.embed(images)}

    def _create_metric(self, stage: str) -> None:
        datamodule = current_datamodule(self.trainer)
        pairs = pairs_of(datamodule, stage)
        if pairs is None:
            raise InputError(
                f"data: VerificationModule needs a datamodule with {stage}_pairs, got {type(datamodule).__name__}; use "
                "LFWDataModule, for example."
            )
        self.verification = self.configure_verification(pairs).to(self.device)

    def _log_metric(self, stage: str) -> None:
        if self.trainer.sanity_checking:  # it covers only some of the images
            return
        for name, value in self.verification.compute().items():
            self.log(f"{stage}/{name}", value.float().to(self.device), prog_bar=name == "acc", sync_dist=True)
