"""How time and memory grow: with classes, batch, dimension and processes.

A step of the head is forward, backward and SGD with momentum, m = 4; beside it stand its three matrix products alone,
and SGD alone. Then the loss by chunks against a linear layer under ``F.cross_entropy``, and classes divided over
processes, by the Trainer. Every row is run in processes of its own, whose peak of memory is counted above what they
began with.

Usage: python benchmarks/scale.py [PLOT.PNG]
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import in_turn, machine, table
from lightning import Callback, Trainer, seed_everything
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lsoftmax_lightning import ClassificationModule, LSoftmaxLinear
from lsoftmax_lightning.chunked_loss import chunk_length
from lsoftmax_lightning.strategies import ClassShardedStrategy

GIB = 2**30
LASTING = 2.0  # seconds that a step is timed
SIZES = [
    *((256, 512, classes) for classes in (10, 100, 1_000, 10_000, 100_000, 1_000_000)),
    *((size, 512, 10_000) for size in (64, 1024, 4096)),
    *((256, width, 10_000) for width in (64, 256, 1024)),
]
AGAINST_LOGITS = [(size, 512, classes) for classes in (10_000, 85_742, 1_000_000) for size in (256, 2048)]
DIVIDED = [(100_000, 1), (100_000, 2), (100_000, 4), (1_000_000, 1), (1_000_000, 2)]


def apart(function: Callable[..., Any], *args: Any, processes: int = 1) -> list[Any]:
    """What a function gives in processes of its own, and the peak of memory of each, GiB; nothing, if they ran out."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork, pipes = multiprocessing.get_context("fork"), []
    for rank in range(processes):
        reader, writer = multiprocessing.Pipe(duplex=False)
        process = fork.Process(target=_apart, args=(writer, rank, processes, port, function, args))
        process.start()
        writer.close()
        pipes.append((process, reader))
    found = []
    for process, reader in pipes:
        try:
            found.append(reader.recv())
        except EOFError:  # killed for want of memory
            return []
        finally:
            process.join()
    return found


def _apart(writer: Any, rank: int, processes: int, port: int, function: Callable[..., Any], args: Any) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "GROUP_RANK": 0}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "scale"}
    os.environ |= {name: str(value) for name, value in (ranks | address).items()}
    Path("/proc/self/oom_score_adj").write_text("1000")
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is counted
    before = _peak()
    found = function(*args)
    writer.send((found, (_peak() - before) / GIB))


def _peak() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def batch(size: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    """Features and classes."""
    torch.manual_seed(0)
    return torch.randn(size, width, requires_grad=True), torch.randint(classes, (size,))


def step_of_head(size: int, width: int, classes: int, plain: bool = False) -> float:
    """Seconds of a step of the head, or with ``plain`` of a linear layer under cross-entropy."""
    head = LSoftmaxLinear(width, classes, margin=4, lambda_=5.0)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.01, momentum=0.9)
    x, target = batch(size, width, classes)

    def step() -> None:
        optimizer.zero_grad()
        if plain:
            loss = F.cross_entropy(head(x), target)
        elif head.uses_chunked_loss:
            loss = head.cross_entropy(x, target).loss
        else:
            loss = F.cross_entropy(head(x, target), target)
        loss.backward()
        optimizer.step()

    return statistics.median(in_turn({"": step}, LASTING, warm_up=1, least=2)[""])


def rows_of_chunk(width: int, classes: int) -> int:
    """Return the number of samples in a chunk of the loss."""
    return chunk_length(torch.empty(1, width), torch.empty(1, 1).expand(classes, width))


def parts_of_head(size: int, width: int, classes: int) -> tuple[float, float]:
    """Seconds of the three matrix products alone, and of SGD alone."""
    weight = torch.randn(classes, width, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.SGD([weight], lr=0.01, momentum=0.9)
    rows = rows_of_chunk(width, classes)
    x, product, gradient = torch.randn(size, width), torch.empty(min(rows, size), classes), torch.zeros(classes, width)

    @torch.no_grad()
    def products() -> None:
        for part in x.split(rows):
            logits = torch.mm(part, weight.T, out=product[: len(part)])
            logits @ weight
            gradient.addmm_(logits.T, part)

    times = in_turn({"products": products, "SGD": optimizer.step}, LASTING, warm_up=1, least=2)
    return statistics.median(times["products"]), statistics.median(times["SGD"])


def growth() -> tuple[list[list[str]], list[tuple[int, float, float, float, float, float]]]:
    """Rows of the first table, and what is drawn of those that differ in classes."""
    rows, drawn = [], []
    for size, width, classes in SIZES:
        [(total, memory)] = apart(step_of_head, size, width, classes)
        [((products, sgd), _)] = apart(parts_of_head, size, width, classes)
        shares = {"matrix products": products, "SGD": sgd, "the rest": total - products - sgd}
        weights = 3 * 4 * classes * width / GIB  # weight, gradient, momentum
        logits = 4 * min(rows_of_chunk(width, classes), size) * classes / GIB
        held = {"weight, gradient, momentum": weights, "logits": logits, "the rest": memory - weights - logits}
        rows.append(
            [
                f"({size}, {width}, {classes:,})",
                *(f"{seconds * 1e3:,.1f}" for seconds in (total, products, sgd)),
                max(shares, key=lambda name: shares[name]),
                *(f"{gib:.3f}" for gib in (memory, weights, logits)),
                max(held, key=lambda name: held[name]),
            ]
        )
        if (size, width) == (256, 512) and len(drawn) < 6:
            drawn.append((classes, total, products, sgd, memory, weights))
    return rows, drawn


def against_logits() -> list[list[str]]:
    """Rows of the second table."""
    rows = []
    for size, width, classes in AGAINST_LOGITS:
        [(ours, our_peak)] = apart(step_of_head, size, width, classes)
        fits = 3 * 4 * classes * (size + width) < 0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        found = apart(step_of_head, size, width, classes, True) if fits else []
        theirs, their_peak = found[0] if found else (None, None)
        rows.append(
            [
                f"({size}, {width}, {classes:,})",
                f"{theirs:.2f}" if theirs else "-",
                f"{ours:.2f}",
                f"{ours / theirs:.2f}" if theirs else "-",
                f"{their_peak:.2f}" if their_peak else "does not fit",
                f"{our_peak:.2f}",
            ]
        )
    return rows


class Passed(nn.Linear):
    """A backbone that costs little beside the head."""

    num_features = 512

    def __init__(self) -> None:
        super().__init__(64, 512)


class Clock(Callback):
    """Times of steps."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """Starts."""
        self.times.append(-time.perf_counter())

    def on_train_batch_end(self, *args: Any) -> None:
        """Stops."""
        self.times[-1] += time.perf_counter()


def trained(classes: int) -> float:
    """Seconds of a step of the Trainer, of 128 samples on all processes together."""
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    processes = int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    seed_everything(0, verbose=False)
    model, clock = ClassificationModule(classes, Passed(), margin=4), Clock()
    data = TensorDataset(torch.randn(128 * 5, 64), torch.randint(classes, (128 * 5,)))
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=ClassShardedStrategy() if processes > 1 else "auto",
        max_epochs=1,
        callbacks=[clock],
        logger=False,
        **dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    trainer.fit(model, DataLoader(data, 128 // processes))
    return statistics.median(clock.times[1:])


def divided() -> list[list[str]]:
    """Rows of the third table."""
    rows = []
    for classes, processes in DIVIDED:
        found = apart(trained, classes, processes=processes)
        seconds, peaks = max(time for time, _ in found), sorted(peak for _, peak in found)
        rows.append([f"{classes:,}", str(processes), f"{seconds:.2f}", f"{peaks[0]:.2f} .. {peaks[-1]:.2f}"])
    return rows


def draw(drawn: list[tuple[int, float, float, float, float, float]], path: str) -> None:
    """Time and memory by classes."""
    classes, total, products, sgd, memory, weights = zip(*drawn, strict=True)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, label, lines in (
        (left, "seconds of a step", {"step": total, "matrix products": products, "SGD": sgd}),
        (right, "GiB at the peak", {"step": memory, "weight, gradient, momentum": weights}),
    ):
        for name, values in lines.items():
            axis.loglog(classes, values, "o-" if name == "step" else "--", label=name)
        axis.set(xlabel="classes", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle("A step of the head by its number of classes: 256 samples, 512 features, m = 4")
    figure.savefig(path, dpi=120)


def main(plot: str = "docs/scale.png") -> None:
    """Prints the tables and leaves the plot."""
    print(f"{machine()}.\n")
    rows, drawn = growth()
    draw(drawn, plot)
    times = ["step, ms", "products, ms", "SGD, ms", "most time in"]
    memory = ["peak, GiB", "weight, gradient, momentum", "logits", "most memory in"]
    print(table(["(N, D, C)", *times, *memory], rows))
    header = ["(N, D, C)", "linear layer, s", "ours, s", "ratio", "linear layer, peak GiB", "ours, peak GiB"]
    print(table(header, against_logits()))
    print(table(["classes", "processes", "step, s", "peak of a process, GiB, least .. most"], divided()))


if __name__ == "__main__":
    main(*sys.argv[1:])
