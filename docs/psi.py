"""Plot psi, which replaces the cosine, for the margins of the paper, as in its Figure 2.

Usage: python docs/psi.py OUTPUT.png
"""

from __future__ import annotations

import sys

import torch
from matplotlib.figure import Figure

from lsoftmax_lightning.functional import psi


def main(output: str) -> None:
    """Save a plot with a line and the knots for each margin."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    theta = torch.linspace(0, torch.pi, 721, dtype=torch.float64)
    for m in range(1, 5):
        (line,) = axes.plot(theta.rad2deg(), psi(theta.cos(), m), label=f"m = {m}")
        knots = torch.arange(1, m, dtype=torch.float64) * torch.pi / m
        axes.plot(knots.rad2deg(), psi(knots.cos(), m), "o", color=line.get_color(), markersize=4)
    axes.set(xlabel="angle of a sample to its class, degrees", ylabel="psi", xticks=range(0, 181, 45), xlim=(0, 180))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
