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
    """Face verification: trains as a classifier of identities, validates and tests on pairs of images.

    Validation and test batches are (images, image indices), each image once. The Trainer's datamodule has the
    :class:`~lsoftmax_lightning.pairs.Pairs` of these indices as ``val_pairs`` and ``test_pairs``. The metrics of
    :class:`~lsoftmax_lightning.metrics.PairVerification` are logged as ``val/acc``, ``val/auc`` and so on, and
    likewise for test. There is no ``val/loss``, because the people belong to no class.

    Args:
        num_classes: Number of identities. The command line takes it from the data.
        backbone: Name of a network, or any module from images to features (N, D) with D as its ``num_features``.
        pca_components: Width of the embeddings after PCA, as in the paper (section 5). Default: no PCA.
        mirror: Whether to average the embeddings of an image and its mirror image.
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
            raise InputError(f"pca_components must be 1 to {self.head.in_features}, got {pca_components}.")

    def compared_data(self, training: bool) -> DataSpec:
        """Return the specification without classes for an evaluation, which is on other people."""
        spec = super().compared_data(training)
        return spec if training else spec._replace(class_names=())

    def configure_verification(self, pairs: Pairs) -> PairVerification:
        """Return the metric of an evaluation on ``pairs``."""
        return PairVerification(pairs, self.pca_components)

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings (N, D) of images (N, channels, height, width), averaged with the mirror image if ``mirror``."""
        features = self.forward_features(images)
        return (features + self.forward_features(images.flip(3))) / 2 if self.mirror else features

    @override
    def on_validation_epoch_start(self) -> None:
        self._create_metric("val")

    @override
    def on_test_epoch_start(self) -> None:
        self._create_metric("test")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Store the embeddings of the images in the metric."""
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
        """Return the ``embedding`` (N, D) for images or (images, image indices)."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        return {"embedding": self.embed(images)}

    def _create_metric(self, stage: str) -> None:
        datamodule = current_datamodule(self.trainer)
        pairs = pairs_of(datamodule, stage)
        if pairs is None:
            raise InputError(
                f"VerificationModule needs a datamodule that has {stage}_pairs, as LFWDataModule does; got "
                f"{type(datamodule).__name__}."
            )
        self.verification = self.configure_verification(pairs).to(self.device)

    def _log_metric(self, stage: str) -> None:
        if self.trainer.sanity_checking:  # only some images have embeddings
            return
        for name, value in self.verification.compute().items():
            self.log(f"{stage}/{name}", value.float().to(self.device), prog_bar=name == "acc", sync_dist=True)
