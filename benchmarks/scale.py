"""Growth of time and memory with classes, batch size, feature width and processes.

The first table has a step of the head (forward, backward, SGD with momentum, m = 4), its three matrix products alone,
and SGD alone. The second compares the chunked loss with a linear layer and ``F.cross_entropy``; the third shards
classes over processes with a Trainer. Each row runs in separate processes, whose peak memory excludes that at their
start.

Usage: python benchmarks/scale.py [PLOT.png]
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
from common import machine, table, time_interleaved
from lightning import Callback, Trainer, seed_everything
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lsoftmax_lightning import ClassificationModule, LSoftmaxLinear
from lsoftmax_lightning.chunked_loss import chunk_length
from lsoftmax_lightning.strategies import ClassShardedStrategy

GIB = 2**30
DURATION = 2.0  # seconds of timing for a step
SIZES = [
    *((256, 512, classes) for classes in (10, 100, 1_000, 10_000, 100_000, 1_000_000)),
    *((size, 512, 10_000) for size in (64, 1024, 4096)),
    *((256, width, 10_000) for width in (64, 256, 1024)),
]
AGAINST_LOGITS = [(size, 512, classes) for classes in (10_000, 85_742, 1_000_000) for size in (256, 2048)]
SHARDED = [(100_000, 1), (100_000, 2), (100_000, 4), (1_000_000, 1), (1_000_000, 2)]


def in_processes(function: Callable[..., Any], *args: Any, processes: int = 1) -> list[Any]:
    """Return the results of a function in new processes, with the peak memory of each in GiB; empty if it ran out."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork, pipes = multiprocessing.get_context("fork"), []
    for rank in range(processes):
        reader, writer = multiprocessing.Pipe(duplex=False)
        process = fork.Process(target=_run_process, args=(writer, rank, processes, port, function, args))
        process.start()
        writer.close()
        pipes.append((process, reader))
    found = []
    for process, reader in pipes:
        try:
            found.append(reader.recv())
        except EOFError:  # killed because memory ran out
            return []
        finally:
            process.join()
    return found


def _run_process(writer: Any, rank: int, processes: int, port: int, function: Callable[..., Any], args: Any) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "GROUP_RANK": 0}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "scale"}
    os.environ |= {name: str(value) for name, value in (ranks | address).items()}
    Path("/proc/self/oom_score_adj").write_text("1000")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _peak()
    found = function(*args)
    writer.send((found, (_peak() - before) / GIB))


def _peak() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def batch(size: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    """Return random features and classes."""
    torch.manual_seed(0)
    return torch.randn(size, width, requires_grad=True), torch.randint(classes, (size,))


def step_of_head(size: int, width: int, classes: int, plain: bool = False) -> float:
    """Return the seconds of a step of the head, or with ``plain`` of a linear layer with cross-entropy."""
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

    return statistics.median(time_interleaved({"": step}, DURATION, warm_up=1, min_rounds=2)[""])


def rows_of_chunk(width: int, classes: int) -> int:
    """Return the number of samples in a chunk of the loss."""
    return chunk_length(torch.empty(1, width), torch.empty(1, 1).expand(classes, width))


def parts_of_head(size: int, width: int, classes: int) -> tuple[float, float]:
    """Return the seconds of the three matrix products alone, and of SGD alone."""
    weight = torch.randn(classes, width, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.SGD([weight], lr=0.01, momentum=0.9)
    rows = rows_of_chunk(width, classes)
    x, product, gradient = torch.randn(size, width), torch.empty(min(rows, size), classes), torch.zeros(classes, width)

    @torch.no_grad()
    def products() -> None:
        for chunk in x.split(rows):
            logits = torch.mm(chunk, weight.T, out=product[: len(chunk)])
            logits @ weight
            gradient.addmm_(logits.T, chunk)

    times = time_interleaved({"products": products, "SGD": optimizer.step}, DURATION, warm_up=1, min_rounds=2)
    return statistics.median(times["products"]), statistics.median(times["SGD"])


def growth() -> tuple[list[list[str]], list[tuple[int, float, float, float, float, float]]]:
    """Return the rows of the first table, and the values to plot by the number of classes."""
    rows, drawn = [], []
    for size, width, classes in SIZES:
        [(total, memory)] = in_processes(step_of_head, size, width, classes)
        [((products, sgd), _)] = in_processes(parts_of_head, size, width, classes)
        times = {"matrix products": products, "SGD": sgd, "the rest": total - products - sgd}
        weights = 3 * 4 * classes * width / GIB  # weight, gradient, momentum
        logits = 4 * min(rows_of_chunk(width, classes), size) * classes / GIB
        memories = {"weight, gradient, momentum": weights, "logits": logits, "the rest": memory - weights - logits}
        rows.append(
            [
                f"({size}, {width}, {classes:,})",
                *(f"{seconds * 1e3:,.1f}" for seconds in (total, products, sgd)),
                max(times, key=lambda name: times[name]),
                *(f"{gib:.3f}" for gib in (memory, weights, logits)),
                max(memories, key=lambda name: memories[name]),
            ]
        )
        if (size, width) == (256, 512) and len(drawn) < 6:
            drawn.append((classes, total, products, sgd, memory, weights))
    return rows, drawn


def against_logits() -> list[list[str]]:
    """Return the rows of the second table."""
    rows = []
    for size, width, classes in AGAINST_LOGITS:
        [(ours, our_peak)] = in_processes(step_of_head, size, width, classes)
        fits = 3 * 4 * classes * (size + width) < 0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        found = in_processes(step_of_head, size, width, classes, True) if fits else []
        linear, linear_peak = found[0] if found else (None, None)
        rows.append(
            [
                f"({size}, {width}, {classes:,})",
                f"{linear:.2f}" if linear else "-",
                f"{ours:.2f}",
                f"{ours / linear:.2f}" if linear else "-",
                f"{linear_peak:.2f}" if linear_peak else "does not fit",
                f"{our_peak:.2f}",
            ]
        )
    return rows


class CheapBackbone(nn.Linear):
    """A backbone that takes little time compared with the head."""

    num_features = 512

    def __init__(self) -> None:
        super().__init__(64, 512)


class Clock(Callback):
    """Measure the seconds of each training step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """Start the clock."""
        self.times.append(-time.perf_counter())

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop the clock."""
        self.times[-1] += time.perf_counter()


def trainer_step(classes: int) -> float:
    """Return the seconds of a step of a Trainer, with 128 samples on all processes together."""
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    processes = int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    seed_everything(0, verbose=False)
    model, clock = ClassificationModule(classes, CheapBackbone(), margin=4), Clock()
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


def sharded() -> list[list[str]]:
    """Return the rows of the third table."""
    rows = []
    for classes, processes in SHARDED:
        found = in_processes(trainer_step, classes, processes=processes)
        seconds, peaks = max(time for time, _ in found), sorted(peak for _, peak in found)
        rows.append([f"{classes:,}", str(processes), f"{seconds:.2f}", f"{peaks[0]:.2f} .. {peaks[-1]:.2f}"])
    return rows


def draw(drawn: list[tuple[int, float, float, float, float, float]], path: str) -> None:
    """Plot time and memory by the number of classes."""
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
    """Print the tables and save the plot."""
    print(f"{machine()}.\n")
    rows, drawn = growth()
    draw(drawn, plot)
    times = ["step, ms", "products, ms", "SGD, ms", "most time in"]
    memory = ["peak, GiB", "weight, gradient, momentum", "logits", "most memory in"]
    print(table(["(N, D, C)", *times, *memory], rows))
    header = ["(N, D, C)", "linear layer, s", "ours, s", "ratio", "linear layer, peak GiB", "ours, peak GiB"]
    print(table(header, against_logits()))
    print(table(["classes", "processes", "step, s", "peak of a process, GiB, least .. most"], sharded()))


if __name__ == "__main__":
    main(*sys.argv[1:])
