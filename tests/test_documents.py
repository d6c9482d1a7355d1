"""Commands and programs of README, docs and examples run as printed, with small data."""

import csv
import glob
import json
import math
import re
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from IPython.core.interactiveshell import InteractiveShell
from sphinx.cmd.build import main as build
from torchvision.datasets import CIFAR10
from traitlets.config import Config

from lsoftmax_lightning.cli import main
from lsoftmax_lightning.compare.paper import paper_accuracy, paper_experiment
from lsoftmax_lightning.compare.planning import Run, plan
from lsoftmax_lightning.datamodules import DigitsDataModule

from .helpers.forked import launch, run_on, srun, torchrun
from .helpers.formats import write_cifar, write_folder, write_image, write_lfw, write_mnist
from .helpers.training import WRITES_ONNX

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))


def files(page: Path) -> dict[str, str]:
    """The fenced files of a page, by the names in their first lines."""
    return dict(re.findall(r"```(?:python|yaml)\n# (\w+\.\w+)\n(.*?)```", page.read_text(), flags=re.DOTALL))


FILES = {name: text for page in PAGES for name, text in files(page).items()}
PROGRAMS = ("docker", "make", "pip", "pre-commit", "pytest", "python", "source", "srun", "tensorboard", "torchrun")
SMALL = [
    "--data.batch_size=8",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=1",
    "--trainer.max_epochs=1",
    "--trainer.val_check_interval=1",
    "--trainer.limit_train_batches=1",
    "--trainer.num_sanity_val_steps=0",
    "--data.train_size=null",  # the generated data are smaller than what a page asks for
    "--trainer.precision=32-true",  # elsewhere than on the newest processors bf16 takes minutes
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--dashboard.every_n_epochs=0",
]


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command on a page, after loops and variables are expanded by bash."""
    script = "".join(
        f"{name}() {{ printf '%s\\0' {name} \"$@\"; printf '\\n\\0'; }}\n"  # prints its arguments
        for name in PROGRAMS
    )
    script += "".join(re.findall(r"^```sh\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE))
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words: list[str] = []
    for word in done.stdout.split("\0")[:-1]:
        if word == "\n":
            yield words
            words = []
        else:
            words.append(word)


def prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Create the data that the pages use, and a finished run."""
    write_mnist(Path("data"))
    write_mnist(Path("data"), folder="FashionMNIST")
    write_cifar(Path("data"), monkeypatch, CIFAR10)
    write_folder(Path("cifar10-jpeg"))
    write_folder(Path("my_images"))
    write_folder(Path("photos"))
    write_folder(Path(), ("casia-webface",))
    shutil.copytree(ROOT / "docs" / "results", "docs/results")
    write_lfw(Path("lfw"), folds=10, count=5)
    write_lfw(Path("faces"), folds=10, count=5)
    for name in ("casia-webface", "lfw"):
        Path("data", name).symlink_to(Path(name).absolute())
    main(["fit", "--config", "digits.yaml", *SMALL])
    for name in ("mnist_1000", "mnist_1000-noisy"):  # comparisons, which are planned and not trained
        folder = Path("runs", f"compare-{name}")
        folder.mkdir()
        (folder / "results.csv").write_text("margin,seed,test/acc\n1,0,0.9\n4,0,0.95\n")


def run(words: list[str], planned: list[int]) -> None:
    """Run a command of this package; check commands of other programs without running them."""
    name, *args = words
    if name == "make":
        subprocess.run(["make", "-n", "-C", str(ROOT), *args], check=True, stdout=subprocess.DEVNULL)
    elif name == "docker":
        assert all((ROOT / word).is_file() for word, before in zip(args[1:], args, strict=False) if before == "-f")
    elif name == "python" and args[0].startswith(("benchmarks/", "tests/")):  # minutes to hours
        assert (ROOT / args[0]).is_file()
    elif name == "python" and args[0].startswith("docs/"):
        program(ROOT / args[0], *(path for word in args[1:] for path in sorted(glob.glob(word)) or [word]))
    elif "export" in args and "--format" not in args and not WRITES_ONNX:
        return
    elif "lsoftmax_lightning" in args:
        run_ours(args[args.index("lsoftmax_lightning") + 1 :], name, planned)
    else:
        assert name in ("pip", "pre-commit", "pytest", "source", "tensorboard") or args[:2] == ["-m", "venv"]


def run_ours(args: list[str], starter: str, planned: list[int]) -> None:
    """Run a command of this package in this process, or on several ranks in forks."""
    if {"--help", "--full_help"} & set(args) or any(word.endswith(".help") for word in args):
        with suppress(SystemExit):  # with code 0, or the command would print an error
            main(args)
        return
    if args[0] in ("fit", "validate", "test", "predict"):
        args = [*args, *SMALL, *(["--data.image_size=32"] if "lfw.yaml" in args else [])]
        if {"--dashboard.html", "--dashboard.save"} & set(args):  # they need plots
            args += ["--dashboard.every_n_epochs=1"]
    if "--trainer.devices" in args:
        nodes = 2 if "--trainer.num_nodes" in args else 1
        args[args.index("--trainer.devices") + 1] = str(2 // nodes)
        done = run_on(2, partial(main, args), partial(srun if starter == "srun" else torchrun, nodes=nodes))
        assert done.returncode == 0, done.stderr
        return
    if "--print_config" in args:
        with pytest.raises(SystemExit) as ended:
            main(args)
        assert ended.value.code == 0
        return
    before = len(planned)
    main(args)
    assert (len(planned) > before) is (args[0] == "compare" and "--report" not in args)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Plan comparisons without training; return the list of their numbers of runs."""
    planned: list[int] = []
    monkeypatch.setattr("lsoftmax_lightning.compare.train", lambda runs, *rest: planned.append(len(runs)) or {})
    monkeypatch.setattr("lsoftmax_lightning.commands.report", lambda paths, folder, **options: None)
    return planned


def at_least(page: Path) -> int:
    """Return the minimum number of runs of the comparisons on a page."""
    return 3 if page.name == "results.md" else 5


def plan_fewer(
    least: int,
    configs: list[str],
    margins: list[int],
    seeds: list[int],
    settings: list[str],
    sweep: dict[str, list[Any]],
    folder: Path,
) -> list[Run]:
    """Plan one margin and seed, and each value of the other settings once: each run takes a quarter of a second.

    Returns:
        The last of these runs.
    """
    assert len(margins) * len(seeds) * math.prod(map(len, sweep.values())) >= least
    for index in range(max(map(len, sweep.values()), default=1)):
        values = {name: [values[index % len(values)]] for name, values in sweep.items()}
        runs = plan(configs, margins[:1], seeds[:1], settings, values, folder)
    return runs


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=str(page.relative_to(ROOT)), marks=[] if page.parent == ROOT else pytest.mark.slow)
        for page in PAGES
    ],
)
@pytest.mark.filterwarnings("ignore")  # warnings about tiny trainings
def test_every_command_runs(page: Path, planned: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(commands(page))
    if found:
        prepare(monkeypatch)
        for name, text in files(page).items():
            Path(name).write_text(text)
        monkeypatch.syspath_prepend(".")
    monkeypatch.setattr("lsoftmax_lightning.compare.plan", partial(plan_fewer, at_least(page)))
    for words in found:
        run(words, planned)
    assert set(planned) <= {1}
    assert planned or " compare --config" not in page.read_text()


def test_tables_of_the_results_page_equal_the_committed_rows(capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs" / "results.md"
    text = page.read_text()
    shown = set()
    for words in commands(page):
        paths = [word for word in words if word.startswith("docs/results/")]
        if not paths:
            continue
        shown.update(paths)
        if "--report" in words:
            main(["compare", "--report", *(str(ROOT / path) for path in paths)])
        else:
            runpy.run_path(str(ROOT / words[1]))["main"](*(str(ROOT / path) for path in paths))
        table = capsys.readouterr().out.split("\n\n")[0].strip()
        assert table in text, table
    rows = sorted((ROOT / "docs" / "results").glob("*.csv"))
    assert shown == {f"docs/results/{path.name}" for path in rows}
    for path in rows:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                assert all(f"{name} {row[name]}" in text for name in ("torch", "lightning") if name in row)


def experiment_of(config: str) -> str | None:
    return paper_experiment(yaml.safe_load((ROOT / "configs" / config).read_text()))


def test_pages_quote_the_accuracies_of_the_paper_from_the_data_file() -> None:
    tables = []
    for page in PAGES:
        text = page.read_text()
        for table in re.finditer(r"^\|.*\| paper, % \|\n\|[ |-]+\n((?:\|.*\n)+)", text, flags=re.MULTILINE):
            experiment = experiment_of(re.findall(r"--config (\w+\.yaml)", text[: table.start()])[-1])
            rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table[1].splitlines()]
            assert [row[-1] for row in rows] == [paper_accuracy(experiment, int(row[0])) for row in rows]
            tables.append(experiment)
    assert set(tables) == {"MNIST"}
    results = (ROOT / "docs" / "results.md").read_text()
    assert re.findall(r"The paper reports ([\d.]+) % at m = 1", results) == [paper_accuracy("CIFAR10", 1)]


@pytest.mark.parametrize("config", ["mnist.yaml", "cifar10.yaml", "cifar10plus.yaml", "cifar100.yaml", "lfw.yaml"])
def test_configs_quote_the_accuracies_of_the_paper_from_the_data_file(config: str) -> None:
    expected = re.search(r"^# Expected:(.*?);", (ROOT / "configs" / config).read_text(), flags=re.DOTALL | re.MULTILINE)
    assert expected is not None
    quoted = {int(margin): float(value) for value, margin in re.findall(r"([\d.]+) % at m = (\d)", expected[1])}
    if "test error" in expected[1]:
        quoted = {margin: 100 - error for margin, error in quoted.items()}
    assert quoted.keys() == {1, 4}
    for margin, accuracy in quoted.items():
        assert f"{accuracy:.2f}" == paper_accuracy(experiment_of(config), margin).removesuffix("*")


def test_configs_and_files_named_in_the_readme_exist() -> None:
    readme = PAGES[0].read_text()
    for name in re.findall(r"--config (\w+\.yaml)", readme):
        assert (ROOT / "configs" / name).is_file() or name == "my.yaml"
    for path in re.findall(r"\]\(((?:docs|configs)/[^)]+)\)", readme):
        assert (ROOT / path).is_file()


def program(path: Path | str, *args: str) -> str:
    """Run a program and return its output."""

    def work() -> None:
        sys.argv = [str(path), *args]
        sys.path.insert(0, str(Path(path).parent))
        runpy.run_path(str(path), run_name="__main__")

    done = run_on(1, work)
    assert done.returncode == 0, done.stderr
    return done.stdout


def accuracy_in(printed: str) -> float:
    found = re.search(r"(?:test/acc|accuracy)\D*([\d.]+)", printed)
    assert found is not None
    return float(found[1])


@pytest.mark.slow
def test_programs_on_the_pages_run() -> None:
    assert set(FILES) == {
        "quickstart.py",
        "my_project.py",
        "train.py",
        "my.yaml",
        "margin.yaml",  # these two are run by the commands of their page
        "print_lambda.py",
        "bare.py",
        "classify.py",
        "classify_files.py",
        "predict.py",
        "use_onnx.py",
        "existing_module.py",
        "my_schedule.py",
        "my_data.py",
        "my_data.yaml",
        "my_metrics.py",
        "my_metrics.yaml",
        "resume.py",
        "from_pml.py",
        "from_caffe.py",
        "from_port.py",
    }
    for name, text in FILES.items():
        Path(name).write_text(text)
    for name in ("quickstart.py", "bare.py", "resume.py", "from_pml.py", "from_port.py"):
        program(name)
    assert torch.load("my_run/last.ckpt", weights_only=True)["epoch"] == 1
    assert accuracy_in(program("from_caffe.py")) > 0.9
    assert accuracy_in(program("train.py")) > 0.9
    assert accuracy_in(program("existing_module.py")) > 0.95
    for split in ("train", "test"):
        digits = DigitsDataModule().load(train=split == "train")
        np.savez(f"{split}.npz", images=digits.images.numpy(), labels=digits.targets.numpy())
    printed = {}
    for config in ("my.yaml", "my_data.yaml", "my_metrics.yaml"):
        done = run_on(1, partial(main, ["fit", "--config", config]))
        assert done.returncode == 0, done.stderr
        printed[config] = done.stdout
        assert accuracy_in(done.stdout) > 0.9
    assert "chosen by val/f1" in printed["my_metrics.yaml"]
    schedule = ["--model.lambda_schedule", "my_schedule.Cosine", "--model.lambda_schedule.lambda_min", "10"]
    done = run_on(1, partial(main, ["fit", "--config", "digits.yaml", *schedule, "--trainer.logger=false", *SMALL]))
    assert done.returncode == 0, done.stderr

    main(["fit", "--config", "digits.yaml", *SMALL])
    checkpoint = "runs/digits/m4-s0/checkpoints/best.ckpt"
    program("predict.py")
    assert len(Path("digits.csv").read_text().splitlines()) == 361
    assert len(np.load("digits.npy")) == 360
    with Path("digits.csv").open() as file:
        predicted = [row["prediction"] for row in csv.DictReader(file)]
    assert program("classify.py").split() == predicted
    for digit in (7, 8):
        write_image(Path("photos", f"{digit}.png"), (100,))
    assert len(program("classify_files.py").split()) == 2
    if WRITES_ONNX:
        main(["export", "--ckpt_path", checkpoint, "--output", "digits.onnx"])
        assert program("use_onnx.py").split() == predicted


@pytest.mark.parametrize(("name", "least"), [("bare_loop.py", 0.9), ("shapes.py", 0.9), ("faces.py", 0.75)])
def test_the_examples_run(name: str, least: float) -> None:
    assert accuracy_in(program(ROOT / "examples" / name)) > least


def test_another_project_is_found_by_its_class_path() -> None:
    shutil.copytree(ROOT / "examples", ".", dirs_exist_ok=True)
    done = run_on(1, partial(main, ["fit", "--config", "shapes.yaml"]))
    assert done.returncode == 0, done.stderr
    assert accuracy_in(done.stdout) > 0.9
    assert re.search(r"f1 +\d", done.stdout)


def outputs(notebook: dict[str, Any]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each code cell and its outputs."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            yield cell, cell["outputs"]


def bash(line: str, script: str) -> None:
    """Run a cell of bash, whose Python commands run in forks of this process."""
    server, client = socket.socketpair()
    fd = client.fileno()
    python = f"python() {{ printf '%s\\0' \"$@\" >&{fd}; echo >&{fd}; read -r <&{fd}; return $REPLY; }}\n"
    with (
        server,
        server.makefile() as commands,
        subprocess.Popen(["bash", "-euc", python + script], pass_fds=[fd]) as cell,
    ):
        client.close()
        for words in commands:
            args = words.split("\0")[2:-1]
            done = launch(partial(main, args), *args)
            print(done.stdout, done.stderr)  # the cells end with 2>&1
            server.sendall(f"{done.returncode}\n".encode())
    assert cell.returncode == 0


class Shell(InteractiveShell):
    """IPython without a screen."""

    def enable_gui(self, gui: str | None = None) -> None:
        """Draw nothing while no cell runs."""


def run_cells(path: Path) -> None:
    """Run a notebook in this process, because to start a kernel takes longer than most notebooks."""
    shell = Shell(config=Config(HistoryManager={"enabled": False}))
    shell.register_magic_function(bash, "cell")
    for cell, _ in outputs(json.loads(path.read_text())):
        shell.run_cell("".join(cell["source"])).raise_error()


@pytest.mark.slow
@pytest.mark.draws
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_runs_without_an_error_or_a_warning(path: Path) -> None:
    if "onnx" in path.read_text() and not WRITES_ONNX:
        pytest.skip("this torch writes no ONNX")
    done = run_on(1, partial(run_cells, path), lambda rank, count, port: {"IPYTHONDIR": Path("ipython").absolute()})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_committed_notebook_has_its_outputs_and_no_path_of_a_machine(path: Path) -> None:
    notebook = json.loads(path.read_text())
    cells = list(outputs(notebook))
    assert [cell["execution_count"] for cell, _ in cells] == [*range(1, len(cells) + 1)]  # run once, in order
    assert any(results for _, results in cells)
    for _, results in cells:
        for result in results:
            assert result["output_type"] != "error"
            assert result.get("name") != "stderr" or "warning" not in "".join(result["text"]).lower()
            for kind in [kind for kind in result.get("data", {}) if kind.startswith("image/")]:
                del result["data"][kind]
    assert not re.findall(r"/(?:home|Users|root|tmp|work|var|mnt)/|\w:\\+Users", json.dumps(notebook))


@pytest.mark.slow
def test_the_examples_in_docstrings_and_pages_give_what_they_print() -> None:
    done = run_on(1, partial(sphinx, ["-W", "--keep-going", "-b", "doctest", str(ROOT / "docs"), "built"]))
    assert done.returncode == 0, done.stderr


def sphinx(args: list[str]) -> None:
    raise SystemExit(build(args))
