"""Face verification: train on a folder of people, then decide whether two images show the same new person.

Run: python faces.py          (on generated faces)
 or: python faces.py FOLDER   (with images/<Person>/<Person>_<nnnn>.jpg and pairs.txt, the layout of LFW)
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from lightning import Trainer, seed_everything
from PIL import Image

from lsoftmax_lightning import VerificationModule
from lsoftmax_lightning.datamodules import LFWFoldDataModule

FOLDS, COUNT = 10, 8  # folds, and pairs of each kind in a fold


def write_faces(root: Path) -> None:
    """Write eight images of each person, and the pairs; no person is in two folds.

    A face is a grid of 3x2 colours. Noise on the colours makes the images of a person differ.
    """
    random = np.random.default_rng(0)
    lines = [f"{FOLDS}\t{COUNT}"]
    for fold in range(FOLDS):
        people = [f"Person_{fold}_{index}" for index in range(2 * COUNT)]
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
    """Train on the people of nine folds and verify the pairs of the tenth."""
    seed_everything(0)
    data = LFWFoldDataModule(root, image_size=24, batch_size=32, flip=True)
    model = VerificationModule(
        data.num_classes,
        backbone="digits",  # small, as the images are; use "lfw" or a torchvision model for real faces
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
            write_faces(Path(folder))
            main(folder)
