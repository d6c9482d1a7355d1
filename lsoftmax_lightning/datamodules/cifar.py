"""CIFAR10, CIFAR10+ and CIFAR100."""

from __future__ import annotations

from torchvision.datasets import CIFAR10, CIFAR100

from .downloaded import DownloadedDataModule


class CIFAR10DataModule(DownloadedDataModule):
    """50,000 + 10,000 photographs of 32x32 pixels in ten classes, read and downloaded by torchvision.

    With ``crop_padding=4, flip=True``, it is the CIFAR10+ of the paper (section 5). The arguments are those of
    :class:`DownloadedDataModule`.
    """

    reader = CIFAR10
    files = "the six *_batch* files and batches.meta of CIFAR-10"
    folder = CIFAR10.base_folder
    class_names: tuple[str, ...] = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    image_shape = (3, 32, 32)
    mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465)
    std: tuple[float, ...] = (0.2470, 0.2435, 0.2616)


class CIFAR100DataModule(CIFAR10DataModule):
    """50,000 + 10,000 photographs of 32x32 pixels in a hundred classes, read and downloaded by torchvision.

    The arguments are those of :class:`DownloadedDataModule`.
    """

    reader = CIFAR100
    files = "the files train, test and meta of CIFAR-100"
    folder = CIFAR100.base_folder
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    # fmt: off
    class_names = (
        "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
        "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
        "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
        "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
        "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
        "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
        "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
        "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
        "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
        "willow_tree", "wolf", "woman", "worm",
    )
    # fmt: on
