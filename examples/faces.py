"""Face verification on a folder of people: train on some, tell whether two images are of one person for others.

Run: python faces.py          (on faces that it makes up)
 or: python faces.py FOLDER   (images/<Person>/<Person>_<nnnn>.jpg and pairs.txt, as LFW has them)
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from lightning import Trainer, seed_everything
from PIL import Image

from lsoftmax_lightning import VerificationModule
from lsoftmax_lightning.datamodules import LFWFoldDataModule

FOLDS, COUNT = 10, 8  # folds, of as many pairs of a kind


def make_up(root: Path) -> None:
    """People of six coarse features each, eight images of everyone, and pairs; those of a fold are in no other."""
    random = np.random.default_rng(0)
    lines = [f"{FOLDS}\t{COUNT}"]
    for fold in range(FOLDS):
        people = [f"Person_{fold}_{number}" for number in range(2 * COUNT)]
        for person in people:
            face = random.integers(40, 216, size=(3, 2, 3))
            (root / "images" / person).mkdir(parents=True)
            for number in range(1, 9):
                noisy = face + random.normal(scale=12, size=face.shape)
                image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).resize((24, 24))
                image.save(root / "images" / person / f"{person}_{number:04d}.jpg")
        lines += [f"{person}\t1\t2" for person in people[:COUNT]]
        lines += [f"{one}\t1\t{other}\t2" for one, other in zip(people[::2], people[1::2], strict=True)]
    (root / "pairs.txt").write_text("\n".join(lines) + "\n")


def main(root: str) -> None:
    """Trains on the people of nine folds, and verifies the pairs of the tenth."""
    seed_everything(0)
    data = LFWFoldDataModule(root, image_size=24, batch_size=32, flip=True)
    model = VerificationModule(
        data.num_classes,
        backbone="digits",  # small as these faces are; "lfw" is the paper's, and torchvision's are there by name
        image_shape=data.image_shape,
        margin=2,
        mirror=True,
    )
    trainer = Trainer(max_epochs=4, accelerator="cpu", log_every_n_steps=5)
    trainer.fit(model, data)
    trainer.test(model, data)


if __name__ == "__main__":
    if sys.argv[1:]:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            make_up(Path(folder))
            main(folder)
