"""Measurements that require a GPU, on one GPU and in at most eight minutes.

A part that fails is reported and does not stop the others. The tables are printed, and written to gpu.json after each
part. The images of the timed runs are noise; the real training needs CIFAR-10 as folders, FOLDER/{train,test}/CLASS/*.

Usage: python benchmarks/gpu.py [PART ...] [--dry] [--out FOLDER] [--minutes 8] [--cifar10 FOLDER]

  PART     ceilings, waits, exactness, determinism, steps, fit, head, chunks, commands or training; default: all
  --dry    tiny sizes on the CPU, to check that the code runs
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import machine, table
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

import lsoftmax_lightning.functional as functional
from lsoftmax_lightning import LSoftmaxLinear, chunked_loss
from lsoftmax_lightning.backbones import create_backbone
from lsoftmax_lightning.datamodules import CIFAR10DataModule
from lsoftmax_lightning.datamodules.base import Images
from lsoftmax_lightning.datamodules.images import read_image
from lsoftmax_lightning.lightning_cli import LSoftmaxCLI

START = time.perf_counter()
DRY = "--dry" in sys.argv
DEVICE = torch.device("cpu" if DRY else "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FAST = ("--trainer.precision=bf16-mixed", "--model.channels_last=true", "--trainer.benchmark=true")
SWITCHES: dict[str, tuple[str, ...]] = {
    "as shipped": (),
    "bf16-mixed, channels_last, benchmark": FAST,
    "the same, compile": (*FAST, "--model.compile=true"),
    "the same, compile reduce-overhead": (*FAST, "--model.compile=reduce-overhead"),
}


class Table(NamedTuple):
    """A table of results."""

    header: list[str]
    rows: list[list[str]]


def synchronize() -> None:
    """Wait for the device."""
    if not DRY:
        torch.cuda.synchronize()


def milliseconds(step: Callable[[], object], times: int = 20, warm_up: int = 3) -> tuple[float, float]:
    """Return the median milliseconds of a step on the device, and of launching it on the host."""
    for _ in range(1 if DRY else warm_up):
        step()
    device, host = [], []
    for _ in range(2 if DRY else times):
        synchronize()
        begin = time.perf_counter()
        step()
        host.append(time.perf_counter() - begin)
        synchronize()
        device.append(time.perf_counter() - begin)
    return 1000 * statistics.median(device), 1000 * statistics.median(host)


def peak_gib(step: Callable[[], object]) -> float:
    """Return the peak memory of a step in GiB, excluding memory in use before it."""
    if DRY:
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return float(torch.cuda.max_memory_allocated() - before) / 2**30


def autocast(dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Autocast to a dtype below float32."""
    return torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32)


def ceilings() -> Table:
    """Measure the limits of the device, and the transfer of a batch of images."""
    size = 2**12 if DRY else 2**30
    source = torch.randn(size, device=DEVICE, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy, _ = milliseconds(lambda: target.copy_(source))
    side = 64 if DRY else 8192
    matrix = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    product, _ = milliseconds(lambda: matrix @ matrix)
    vector = torch.zeros(8, device=DEVICE)
    launch, _ = milliseconds(lambda: [vector.add_(1) for _ in range(100)])
    images = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8)
    index = torch.randperm(len(images))[:256]
    pinned = images[index] if DRY else images[index].pin_memory()
    on_device, device_index = images.to(DEVICE), index.to(DEVICE)
    batches: dict[str, Callable[[], Tensor]] = {
        "256 CIFAR images, indexed on the host and copied": lambda: images[index].to(DEVICE, non_blocking=True),
        "copied from pinned memory": lambda: pinned.to(DEVICE, non_blocking=True),
        "indexed on the device": lambda: on_device[device_index],
    }
    return Table(
        ["what", "measured"],
        [
            ["copy on the device, read and written", f"{2 * source.nbytes / copy / 1e9:.2f} TB/s"],
            [f"bfloat16 product of {side} x {side}", f"{2 * side**3 / product / 1e9:.0f} TFLOP/s"],
            ["an operation on 8 numbers", f"{1000 * launch / 100:.1f} us"],
            *([name, f"{1000 * milliseconds(step)[0]:.0f} us"] for name, step in batches.items()),
        ],
    )


def waits() -> Table:
    """Find the parts of a training step that wait for the device."""
    data = CIFAR10DataModule(crop_padding=4, flip=True)
    few, many = (LSoftmaxLinear(64, classes, 4, 5.0).to(DEVICE) for classes in (10, 5000))
    x, target = torch.randn(32, 64, device=DEVICE, requires_grad=True), torch.randint(10, (32,), device=DEVICE)
    images = torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
    draws = torch.rand(32, 3, device=DEVICE)
    accuracy = MulticlassAccuracy(5000, average="micro", validate_args=False).to(DEVICE)
    assert data.augment is not None
    augment = data.augment
    parts: dict[str, Callable[[], object]] = {
        "head, 10 classes": lambda: F.cross_entropy(few(x, target), target).backward(),
        "head, 5,000 classes by chunks": lambda: many.cross_entropy(x, target).loss.backward(),
        "crop and flip": lambda: augment(images, draws),
        "normalisation": lambda: data.normalize(images),
        "training accuracy": lambda: accuracy.update(target, target),
    }
    rows = []
    for name, part in parts.items():
        part()
        synchronize()
        found = "no"
        if not DRY:
            torch.cuda.set_sync_debug_mode("error")
        try:
            part()
        except RuntimeError as error:
            found = str(error).splitlines()[0]
        finally:
            if not DRY:
                torch.cuda.set_sync_debug_mode("default")
        rows.append([name, found])
    return Table(["part", "waits for the device"], rows)


def exactness() -> Table:
    """Compare loss and gradients with float64 on the CPU."""
    paths: dict[str, Callable[[LSoftmaxLinear, Tensor, Tensor], Tensor]] = {
        "dense": lambda head, x, y: F.cross_entropy(head(x, y), y),
        "chunked": lambda head, x, y: head.cross_entropy(x, y).loss,
    }
    worst: dict[tuple[str, ...], list[float]] = {}
    for classes in (10, 5000):
        for margin in (1, 2, 3, 4, 8):
            for lambda_ in (0.0, 5.0, math.inf):
                torch.manual_seed(classes + margin)
                head = LSoftmaxLinear(64, classes, margin, lambda_).to(DEVICE)
                target = torch.randint(classes, (96,), device=DEVICE)
                features = head.weight.detach()[target] * 3 + torch.randn(96, 64, device=DEVICE)
                for dtype in DTYPES:
                    x = features.to(dtype).requires_grad_()
                    exact_x, exact_weight = (t.detach().cpu().double().requires_grad_() for t in (x, head.weight))
                    plain = F.linear(exact_x, exact_weight)
                    exact_target = target.cpu()
                    logits = functional.margin_logits(plain, exact_x, exact_weight, exact_target, margin, lambda_)
                    expected = F.cross_entropy(logits, exact_target)
                    gradients = torch.autograd.grad(expected, (exact_x, exact_weight))
                    for name, path in paths.items():
                        with autocast(dtype):
                            loss = path(head, x, target)
                        found = torch.autograd.grad(loss, (x, head.weight))
                        errors = [float((loss.cpu().double() - expected).abs() / expected.abs().clamp_min(1))]
                        errors += [
                            float((a.cpu().double() - b).norm() / b.norm().clamp_min(1e-30))
                            for a, b in zip(found, gradients, strict=True)
                        ]
                        key = f"{classes:,}", str(dtype).removeprefix("torch."), name
                        worst[key] = [max(pair) for pair in zip(worst.get(key, [0.0] * 3), errors, strict=True)]
    rows = [[*key, *(f"{error:.1e}" for error in errors)] for key, errors in worst.items()]
    header = ["classes", "autocast to", "path", "loss", "gradient of features", "gradient of weight"]
    return Table(header, rows)


def determinism() -> Table:
    """Run a backward pass twice in deterministic mode."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    try:
        network = create_backbone("cifar10", (3, 32, 32)).to(DEVICE)
        few, many = (LSoftmaxLinear(256, classes, 4, 5.0).to(DEVICE) for classes in (10, 5000))
        images, target = torch.randn(32, 3, 32, 32, device=DEVICE), torch.randint(10, (32,), device=DEVICE)
        parameters = [*network.parameters(), *few.parameters(), *many.parameters()]

        def gradients() -> tuple[Tensor, ...]:
            features = network(images)
            loss = F.cross_entropy(few(features, target), target) + many.cross_entropy(features, target * 400, 0.1).loss
            return torch.autograd.grad(loss, parameters)

        same = all(map(torch.equal, gradients(), gradients()))
    finally:
        torch.use_deterministic_algorithms(False)
    return Table(["what", "found"], [["two backward passes in deterministic mode", "same bits" if same else "differ"]])


def network_step(dtype: torch.dtype, margin: int, channels_last: bool, compile: str | None) -> Callable[[], None]:
    """Return a training step of the paper's CIFAR10 network, without a Trainer."""
    size = 8 if DRY else 256
    network = create_backbone("cifar10", (3, 32, 32)).to(DEVICE)
    head = LSoftmaxLinear(256, 10, margin, 5.0).to(DEVICE)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network.to(memory_format=layout)
    images = torch.randn(size, 3, 32, 32, device=DEVICE).contiguous(memory_format=layout)
    target = torch.randint(10, (size,), device=DEVICE)
    if compile and not DRY:
        network.compile(mode=compile)
    optimizer = torch.optim.SGD([*network.parameters(), *head.parameters()], lr=0.1, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(dtype):
            loss = F.cross_entropy(head(network(images), target), target)
        loss.backward()
        optimizer.step()

    return step


def steps() -> Table:
    """Time the bare training step of the paper's CIFAR10 network."""
    rows = []
    cases: dict[str, tuple[torch.dtype, int, bool, str | None]] = {
        "float32": (torch.float32, 4, False, None),
        "bfloat16, channels_last": (torch.bfloat16, 4, True, None),
        "the same, m = 1": (torch.bfloat16, 1, True, None),
        "bfloat16, channels_last, compile": (torch.bfloat16, 4, True, "default"),
        "bfloat16, channels_last, compile reduce-overhead": (torch.bfloat16, 4, True, "reduce-overhead"),
    }
    for name, settings in cases.items():
        torch.compiler.reset()
        torch.backends.cudnn.benchmark = settings[2]
        step = network_step(*settings)
        begin = time.perf_counter()
        step()
        step()
        synchronize()
        first = time.perf_counter() - begin
        count = 2 if DRY else 60
        for _ in range(count // 10 + 1):
            step()
        synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            step()
        synchronize()
        each = (time.perf_counter() - begin) / count
        rows.append([name, f"{1000 * each:.2f}", f"{(8 if DRY else 256) / each:,.0f}", f"{first:.1f}"])
    torch.backends.cudnn.benchmark = False
    return Table(["bare step of the CIFAR10 network", "ms", "images/s", "first two steps, s"], rows)


class Noise(CIFAR10DataModule):
    """Noise instead of the images of CIFAR-10."""

    def load(self, train: bool) -> Images:
        """Draw images."""
        count = 120 if DRY else 50_056 if train else 1_000
        images = torch.randint(256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        return Images(images, torch.arange(count) % 10)

    def prepare_data(self) -> None:
        """Skip the download."""


class Clock(Callback):
    """Time steps, record lines that wait for the device in ten steps, and measure its utilisation in twenty."""

    def __init__(self) -> None:
        self.times: list[tuple[int, float]] = []
        self.lines: Counter[str] = Counter()
        self.busy = 0.0
        self.kernels = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start and stop the measurements."""
        step = trainer.global_step
        if DRY:
            self.times.append((step, time.perf_counter()))
            return
        if step == 61:  # none of these ten steps is logged
            self.show, warnings.showwarning = warnings.showwarning, self._note
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        elif step == 71:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = self.show
            warnings.simplefilter("ignore")
        elif step == 75:
            synchronize()
            activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.__enter__()
        elif step == 95:
            synchronize()
            self.profiler.__exit__(None, None, None)
            kernels = [event for event in self.profiler.events() or [] if event.device_type.name == "CUDA"]
            kernels = [event for event in kernels if not event.is_user_annotation]
            self.busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
            self.kernels = len(kernels) / 20
        elif step >= 100 and step % 60 == 40:
            synchronize()
            self.times.append((step, time.perf_counter()))

    def _note(self, message: Any, category: Any, filename: str, lineno: int, *args: Any) -> None:
        if "synchroniz" in str(message):
            frames = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_stack()[:-1]]
            self.lines[" < ".join(frames[-3:][::-1])] += 1

    def row(self, name: str) -> list[str]:
        """Return the row of a table."""
        spans = zip(self.times, self.times[1:], strict=False)
        each = statistics.median((after[1] - before[1]) / (after[0] - before[0]) for before, after in spans)
        size = 8 if DRY else 256
        busy = f"{self.busy / 20 / each:.0%}" if self.busy else "-"
        lines = "; ".join(f"{count} {line}" for line, count in self.lines.most_common(3)) or "none"
        return [name, f"{1000 * each:.2f}", f"{size / each:,.0f}", busy, f"{self.kernels:.0f}", lines]


class Bare(LightningModule):
    """A minimal module with the CIFAR10 network."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = create_backbone("cifar10", (3, 32, 32))
        self.head = LSoftmaxLinear(256, 10, 4, 5.0)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self.head(self.backbone(batch[0]), batch[1]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


def fit() -> Table:
    """Time `fit` with the CIFAR10 network, as shipped and with switches, and a minimal module in a Trainer."""
    size, count = (8, 4) if DRY else (256, 345)
    clock = Clock()
    names = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    settings: dict[str, Any] = {"max_steps": count, "limit_val_batches": 0, **dict.fromkeys(names, False)}
    settings |= {"accelerator": "cpu" if DRY else "gpu", "devices": 1}
    Trainer(callbacks=[clock], **settings).fit(Bare(), Noise(batch_size=size, val_size=20 if DRY else 5000))
    rows = [clock.row("bare Trainer, float32")]
    for name, switches in SWITCHES.items():
        if DRY and "compile" in name:
            continue
        torch.compiler.reset()
        torch.backends.cudnn.benchmark = False
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["fit", "--config=cifar10.yaml", "--data=gpu.Noise", f"--data.batch_size={size}"]
            arguments += ["--data.crop_padding=4", "--data.flip=true", f"--data.val_size={20 if DRY else 5000}"]
            arguments += [f"--trainer.max_steps={count}", "--trainer.limit_val_batches=0", "--trainer.devices=1"]
            arguments += [f"--trainer.accelerator={'cpu' if DRY else 'gpu'}", "--trainer.limit_test_batches=1"]
            arguments += [f"--trainer.logger.save_dir={folder}", "--dashboard.every_n_epochs=0", *switches]
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    LSoftmaxCLI(arguments, callbacks=[clock])
                rows.append(clock.row(name))
            except Exception as error:
                rows.append([name, f"{type(error).__name__}: {str(error).splitlines()[0]}", "", "", "", ""])
    header = ["fit of the CIFAR10 network", "ms a step", "images/s", "GPU busy", "kernels a step", "waits in ten steps"]
    return Table(header, rows)


def head() -> Table:
    """Time the head with a margin, a linear layer and another implementation."""
    sizes = [(256, 256, 10), (256, 512, 1000), (512, 512, 10_572), (256, 512, 85_742), (2048, 512, 85_742)]
    sizes = [(16, 8, 10), (16, 8, 5000)] if DRY else [*sizes, (256, 512, 1_000_000)]
    rows = []
    for samples, width, classes in sizes:
        for dtype in DTYPES[:2]:
            layer = LSoftmaxLinear(width, classes, 4, 5.0, device=DEVICE)
            weight, target = layer.weight, torch.randint(classes, (samples,), device=DEVICE)
            x = torch.randn(samples, width, device=DEVICE, dtype=dtype, requires_grad=True)
            jobs: dict[str, Callable[[], Tensor]] = {}
            if classes <= 100_000:
                jobs["linear"] = lambda x=x, weight=weight, y=target: F.cross_entropy(F.linear(x, weight), y)
                jobs["dense"] = lambda layer=layer, x=x, y=target: F.cross_entropy(layer(x, y), y)
                with contextlib.suppress(ImportError):
                    from pytorch_metric_learning.losses import LargeMarginSoftmaxLoss

                    peer = LargeMarginSoftmaxLoss(classes, width, margin=4, scale=1).to(DEVICE)
                    jobs["peer"] = lambda peer=peer, x=x, y=target: peer(x.float(), y)
            jobs["chunked"] = lambda layer=layer, x=x, y=target: layer.cross_entropy(x, y).loss
            row = [f"({samples:,}, {width}, {classes:,})", str(dtype).removeprefix("torch.")]
            for name in ("linear", "dense", "chunked", "peer"):
                if name not in jobs:
                    row.append("-")
                    continue

                def step(job: Callable[[], Tensor] = jobs[name], x: Tensor = x, dtype: torch.dtype = dtype) -> None:
                    x.grad = None
                    with autocast(dtype):
                        loss = job()
                    loss.backward()

                row.append(f"{milliseconds(step, 10)[0]:.2f} ms, {peak_gib(step):.2f} GiB")
            rows.append(row)
            del layer, weight, x, jobs
            if not DRY:
                torch.cuda.empty_cache()
    header = ["(N, D, C)", "autocast to", "linear, cross-entropy", "dense", "chunked", "pytorch-metric-learning"]
    return Table(header, rows)


def chunks() -> Table:
    """Time the chunked loss by the size of its chunks."""
    sizes = [(64, 8, 5000)] if DRY else [(2048, 512, 10_572), (2048, 512, 85_742), (1024, 512, 1_000_000)]
    name = "CHUNK_LOGITS" if DRY else "CHUNK_LOGITS_ACCELERATOR"
    default, rows = getattr(chunked_loss, name), []
    try:
        for samples, width, classes in sizes:
            layer = LSoftmaxLinear(width, classes, 4, 5.0, device=DEVICE)
            x = torch.randn(samples, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
            target = torch.randint(classes, (samples,), device=DEVICE)

            def step(layer: LSoftmaxLinear = layer, x: Tensor = x, target: Tensor = target) -> None:
                x.grad = layer.weight.grad = None
                with autocast(torch.bfloat16):
                    loss = layer.cross_entropy(x, target).loss
                loss.backward()

            for power in (23, 25, 26, 27, 28, 29):
                setattr(chunked_loss, name, 2**power)
                device, host = milliseconds(step, 7)
                length = min(samples, chunked_loss.chunk_length(x, layer.weight))
                size = f"({samples:,}, {width}, {classes:,})"
                rows.append([size, f"2^{power}", str(length), f"{device:.2f}", f"{host:.2f}", f"{peak_gib(step):.2f}"])
            del layer, x
            if not DRY:
                torch.cuda.empty_cache()
    finally:
        setattr(chunked_loss, name, default)
    return Table(["(N, D, C), bfloat16", "logits", "samples a chunk", "ms", "host, ms", "GiB"], rows)


def start_fit(folder: Path, name: str, *arguments: str, config: str = "digits.yaml") -> subprocess.Popen[str]:
    """Start `fit` in the background."""
    command = [sys.executable, "-m", "lsoftmax_lightning", "fit", f"--config={config}", "--trainer.devices=1"]
    command += [f"--trainer.logger.save_dir={folder}", f"--trainer.logger.name={name}", *arguments]
    command += [f"--trainer.accelerator={'cpu' if DRY else 'gpu'}", "--trainer.enable_progress_bar=false"]
    log = (folder / f"{name}.log").open("a")
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])  # of the module gpu
    env = os.environ | {"PYTHONPATH": paths}
    return subprocess.Popen(command, stdout=log, stderr=log, text=True, cwd=folder, env=env)


def result(folder: Path, name: str, process: subprocess.Popen[str], until: float) -> dict[str, Any]:
    """Wait for a command, and return its results, or the last line of its output as ``error``."""
    try:
        code = process.wait(max(1, until - time.perf_counter()))
    except subprocess.TimeoutExpired:
        process.kill()
        return {"error": "no time left"}
    path = next((folder / name).glob("*/results.json"), None)
    if code or path is None:
        return {"error": ((folder / f"{name}.log").read_text().strip().splitlines() or [f"code {code}"])[-1]}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def commands() -> Table:
    """Run commands in parallel: precisions, strategies over NCCL on one process, a stop and a resume."""
    exact = ("--trainer.deterministic=true", "--dashboard.every_n_epochs=0")
    jobs = {
        "whole": exact,
        "stopped": exact,
        "bf16-mixed": ("--trainer.precision=bf16-mixed", "--model.channels_last=true"),
        "16-mixed": ("--trainer.precision=16-mixed",),
        "bf16-true": ("--trainer.precision=bf16-true",),
        "ddp": ("--trainer.strategy=ddp",),
        "class_sharded, sync_batchnorm": ("--trainer.strategy=class_sharded", "--trainer.sync_batchnorm=true"),
    }
    if DRY:  # two at a time on a small machine
        exact = (*exact, "--trainer.max_epochs=10")
        jobs = {"whole": exact, "stopped": exact}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        started = {name: start_fit(folder, name, *arguments) for name, arguments in jobs.items()}
        until = time.perf_counter() + 150
        last = folder / "stopped" / "m4-s0" / "checkpoints" / "last.ckpt"
        while time.perf_counter() < until and not last.is_file() and started["stopped"].poll() is None:
            time.sleep(0.05)
        started["stopped"].send_signal(signal.SIGTERM)
        code = started["stopped"].wait(60)
        started["stopped"] = start_fit(folder, "stopped", *exact, "--ckpt_path=last")
        rows = []
        for name, process in started.items():
            found = result(folder, name, process, until)
            rows.append([name, found["error"] if "error" in found else f"{found['test/acc']:.1%}"])
        weights = [
            torch.load(folder / name / "m4-s0" / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
            for name in ("whole", "stopped")
        ]
        one, other = (checkpoint["state_dict"] for checkpoint in weights)
        same = all(torch.equal(one[name], other[name]) for name in one)
    rows.append([f"stopped (code {code}) and resumed, against the whole run", "same bits" if same else "differs"])
    return Table(["digits.yaml", "test accuracy"], rows)


class Stored(CIFAR10DataModule):
    """CIFAR-10 from a file of tensors."""

    def load(self, train: bool) -> Images:
        """Read the images."""
        return Images(*torch.load(Path(self.root, f"{'train' if train else 'test'}.pt"), weights_only=True))

    def prepare_data(self) -> None:
        """Skip the download."""


def store(source: Path, target: Path) -> None:
    """Read CIFAR-10 from folders of images."""
    classes = sorted(folder.name for folder in (source / "train").iterdir())
    for part in ("train", "test"):
        paths = [path for name in classes for path in sorted((source / part / name).iterdir())]
        paths = paths[:: len(paths) // 100 if DRY else 1]
        with ThreadPoolExecutor(16) as pool:
            images = torch.stack(list(pool.map(lambda path: read_image(path, (32, 32)), paths)))
        targets = torch.tensor([classes.index(path.parent.name) for path in paths])
        torch.save((images, targets), target / f"{part}.pt")


def training(cifar10: Path, until: float) -> Table:
    """Train the paper's CIFAR10 network for its whole schedule, all margins in parallel."""
    steps = 4 if DRY else 18_000
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        store(cifar10, folder)
        arguments = [*FAST[: 0 if DRY else None], "--data=gpu.Stored", f"--data.root={folder}"]
        arguments += [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps // 4}"]
        arguments += ["--dashboard.every_n_epochs=0", "--trainer.limit_train_batches=1.0"]
        arguments += ["--data.batch_size=8"] if DRY else ["--model.compile=reduce-overhead"]
        began = time.perf_counter()
        started = {
            margin: start_fit(folder, f"m{margin}", *arguments, f"--model.margin={margin}", config="cifar10.yaml")
            for margin in ((4,) if DRY else (1, 2, 3, 4))
        }
        rows = []
        for margin, process in started.items():
            found = result(folder, f"m{margin}", process, until)
            took = f"{time.perf_counter() - began:.0f}"
            if "error" in found:
                rows.append([str(margin), found["error"], "", took])
                continue
            rows.append([str(margin), f"{found['test/acc']:.2%}", f"{found['test/angle']:.1f}", took])
    header = [f"m, {steps:,} steps side by side", "test accuracy", "angle to own class, degrees", "seconds, at most"]
    return Table(header, rows)


@contextlib.contextmanager
def reported(name: str) -> Iterator[None]:
    """Print an error instead of raising it."""
    print(f"[{time.perf_counter() - START:4.0f} s] {name}", flush=True)
    try:
        yield
    except Exception:
        traceback.print_exc(limit=-4)


def main() -> None:
    """Run the parts, print their tables and write them to a file."""
    parts: dict[str, Callable[..., Table]] = {
        part.__name__: part
        for part in (ceilings, waits, exactness, determinism, steps, fit, head, chunks, commands, training)
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *parts], metavar="PART")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--cifar10", type=Path)
    args = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        parser.error("there is no GPU; --dry runs the same code on the CPU")
    for name in ("lightning.pytorch", "lightning", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine()}
    print(f"{results['machine']}.\n", flush=True)
    until = START + 60 * args.minutes
    for name in args.parts or parts:
        if name == "training" and args.cifar10 is None:
            continue
        if time.perf_counter() > until - 10:
            print(f"{name}: left out, no time", flush=True)
            continue
        with reported(name):
            found = parts[name](args.cifar10, until) if name == "training" else parts[name]()
            results[name] = found._asdict()
            print(f"\n{table(*found)}", flush=True)
            (args.out / "gpu.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    sys.modules["gpu"] = sys.modules["__main__"]  # the command line imports its classes
    main()
