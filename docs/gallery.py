"""Prepares the pictures of docs/gallery.md.

Usage: python docs/gallery.py --faces FOLDER     writes a small set of synthetic faces, those of examples/faces.py
   or: python docs/gallery.py OUTPUT PICTURE ... writes each picture, at most 900 pixels wide, to the folder OUTPUT
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from PIL import Image

WIDTH = 900  # pixels
PAIRS = 30  # of each kind in a fold


def write_faces(folder: Path) -> None:
    """Write faces as examples/faces.py makes them up, with more pairs in a fold."""
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "faces.py"))["write_faces"]
    example.__globals__["COUNT"] = PAIRS
    example(folder)


def shrink(picture: Path, output: Path) -> None:
    """Write a picture as a PNG of at most 900 pixels in width and 256 colours, named after its comparison and file."""
    comparison = "".join(f"{part}_" for part in picture.parts if part.startswith("compare-"))
    with Image.open(picture) as image:
        height = round(image.height * min(1, WIDTH / image.width))
        small = image.convert("RGB").resize((min(image.width, WIDTH), height), Image.Resampling.LANCZOS)
    path = output / f"{comparison}{picture.stem}.png"
    small.quantize(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main(first: str, *rest: str) -> None:
    """Run one of the two tasks."""
    if first == "--faces":
        write_faces(Path(rest[0]))
        return
    Path(first).mkdir(parents=True, exist_ok=True)
    for name in rest:
        if Path(name).is_file():
            shrink(Path(name), Path(first))
        else:
            print(f"{name}: not found, left out")


if __name__ == "__main__":
    main(*sys.argv[1:])
