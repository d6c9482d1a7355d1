"""Import order of the modules, and private names."""

import ast
import re
from pathlib import Path
from typing import TypeGuard

import pytest

import lsoftmax_lightning

PACKAGE = Path(lsoftmax_lightning.__file__).parent
# each module or subpackage and those it may import
BELOW: dict[str, set[str]] = {
    "errors": set(),
    "atomic": {"errors"},
    "compat": set(),
    "library_messages": set(),
    "process_group": set(),
    "seeds": set(),
    "signals": set(),
    "class_names": set(),
    "data_spec": {"class_names", "errors", "transforms"},
    "functional": {"errors"},
    "schedules": {"errors"},
    "lr_schedulers": {"compat", "errors"},
    "geometry": set(),
    "pairs": {"errors"},
    "distributed": set(),
    "chunked_loss": {"compat", "distributed", "errors", "functional"},
    "heads": {"chunked_loss", "distributed", "errors", "functional"},
    "strategies": {"checkpoints", "chunked_loss", "compat", "errors", "heads"},
    "backbones": {"errors"},
    "checkpoints": {"atomic", "data_spec", "errors", "library_messages"},
    "dashboard": {
        "atomic",
        "class_names",
        "compat",
        "errors",
        "functional",
        "geometry",
        "heads",
        "html_page",
        "metric_labels",
        "metrics",
        "pairs",
        "provenance",
        "schedules",
        "seeds",
    },
    "callbacks": {
        "atomic",
        "checkpoints",
        "class_names",
        "compat",
        "dashboard",
        "errors",
        "heads",
        "metrics",
        "process_group",
        "schedules",
        "seeds",
        "signals",
    },
    "modules": {
        "chunked_loss",
        "compat",
        "errors",
        "functional",
        "geometry",
        "backbones",
        "callbacks",
        "checkpoints",
        "data_spec",
        "heads",
        "lr_schedulers",
        "metrics",
        "pairs",
        "schedules",
    },
    "metrics": {"errors", "geometry", "pairs"},
    "transforms": {"errors"},
    "datamodules": {
        "atomic",
        "checkpoints",
        "compat",
        "data_spec",
        "errors",
        "library_messages",
        "pairs",
        "seeds",
        "signals",
        "transforms",
    },
    "__init__": {"heads", "modules"},
    "config_paths": {"errors"},
    "config_files": {"compat", "config_paths", "errors", "library_messages"},
    "mistakes": {"compat", "config_files", "config_paths", "errors"},
    "settings": {"datamodules", "errors", "geometry", "metrics", "modules"},
    "run_folder": {"atomic", "checkpoints", "config_files", "errors", "library_messages", "settings"},
    "command_parser": {"errors"},
    "short_help": {"config_paths", "errors"},
    "html_page": {"atomic"},
    "metric_labels": set(),
    "provenance": set(),
    "screen": {"library_messages", "metric_labels", "user_errors"},
    "lightning_cli": {
        "atomic",
        "compat",
        "config_files",
        "errors",
        "callbacks",
        "checkpoints",
        "dashboard",
        "datamodules",
        "library_messages",
        "lr_schedulers",
        "mistakes",
        "modules",
        "run_folder",
        "schedules",
        "screen",
        "settings",
        "signals",
        "strategies",
        "user_errors",
    },
    "user_errors": {"errors", "library_messages", "process_group", "signals"},
    "compare": {
        "atomic",
        "callbacks",
        "config_files",
        "errors",
        "functional",
        "geometry",
        "dashboard",
        "html_page",
        "lightning_cli",
        "provenance",
        "signals",
        "user_errors",
    },
    "export": {"atomic", "data_spec", "errors", "checkpoints"},
    "commands": {
        "command_parser",
        "compare",
        "config_paths",
        "errors",
        "export",
        "lightning_cli",
        "settings",
        "signals",
    },
    "cli": {
        "command_parser",
        "commands",
        "config_paths",
        "errors",
        "lightning_cli",
        "short_help",
        "signals",
        "user_errors",
    },
    "__main__": {"cli"},
}


def imported_modules(path: Path) -> set[str]:
    """Return the modules and subpackages of this package that a file imports."""
    package = path.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + tuple((node.module or "").split("."))
            base = tuple(part for part in base if part)
            names = [("lsoftmax_lightning", *base, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [tuple((node.module or "").split("."))]
        else:
            continue
        found |= {name[1] for name in names if name[0] == "lsoftmax_lightning" and len(name) > 1}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_only_modules_below(path: Path) -> None:
    module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert module in BELOW, f"{module} is new: add the modules that it may import"
    assert imported_modules(path) - {module} <= BELOW[module]


def test_import_order_has_no_cycle() -> None:
    def height(module: str) -> int:
        return 1 + max((height(below) for below in BELOW[module] - {module}), default=0)

    assert all(height(module) for module in BELOW)


def test_compare_has_no_function_with_the_name_of_a_module() -> None:
    paths = list((PACKAGE / "compare").glob("*.py"))
    functions = {
        node.name for path in paths for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)
    }
    assert not functions & {"compare", *(path.stem for path in paths)}


def test_no_test_module_imports_another() -> None:
    tests = Path(__file__).parent
    for path in tests.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names if not node.module)]
                modules = [name for name in names if name.startswith("test_") or name == "conftest"]
                assert not modules, f"{path.relative_to(tests)} imports {modules}"


def private_names(path: Path) -> set[str]:
    """Return the private names of other objects and modules that a file reads, sets or imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            owner = node.value.func if isinstance(node.value, ast.Call) else node.value
            is_self = isinstance(owner, ast.Name) and owner.id in ("self", "cls", "super")
            names |= {node.attr} if not is_self else set()
        elif isinstance(node, ast.ImportFrom):
            names |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            names |= {argument.value.rpartition(".")[2] for argument in node.args[:2] if is_text(argument)}
    named_tuple = {"_asdict", "_fields", "_make", "_replace"}
    return {name for name in names if re.match("_[a-zA-Z]", name)} - named_tuple - {"_exit"}


def is_text(node: ast.expr) -> TypeGuard[ast.Constant]:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


PRIVATE_NAMES_IN_TESTS: dict[str, set[str]] = {  # without a public equivalent
    "datamodules/test_security.py": {"_get_redirect_url", "_urlretrieve"},
    "helpers/forked.py": {"_run_after_forkers"},
    "helpers/simulated_fit.py": {"_C", "_set_only_lift_cpu_tensors"},
    "helpers/training.py": {"_forward_hooks"},
    "kills_process.py": {"_run_after_forkers", "_run_exitfuncs"},
    "test_compat.py": {"_configure_launcher", "_pytree", "_tree_flatten"},
    "test_interruption.py": {"_ChildProcessObserver", "_SubprocessScriptLauncher"},
}


def test_tests_use_public_names() -> None:
    tests = Path(__file__).parent
    for path in tests.rglob("*.py"):
        name = path.relative_to(tests).as_posix()
        if name != "helpers/simulated.py":  # registers a device with torch
            assert private_names(path) <= PRIVATE_NAMES_IN_TESTS.get(name, set()), name


def test_fields_of_public_named_tuples_are_documented() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and "NamedTuple" in map(ast.unparse, node.bases) and node.name[0] != "_":
                for statement, after in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
                    if isinstance(statement, ast.AnnAssign):
                        documented = isinstance(after, ast.Expr) and is_text(after.value)
                        assert documented, f"{node.name}.{ast.unparse(statement.target)}"


def test_private_names_of_libraries_are_in_compat() -> None:
    overridden = {"_apply"}  # an extension point of nn.Module
    for path in PACKAGE.rglob("*.py"):
        if path.name != "compat.py":
            assert private_names(path) <= overridden, path
