"""The shape of the code, held by its syntax trees: import arrows, forbidden calls, options."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

SOURCE = Path(__file__).parent.parent / "src" / "moebius"
FILES = sorted(SOURCE.rglob("*.py"))

# What each package of moebius may import, besides itself.
ARROWS: dict[str, set[str]] = {
    "__version__": set(),  # the release, beside all packages
    "errors": set(),
    "logs": set(),
    "files": {"errors"},
    "request": {"errors"},
    "schedule": {"errors", "request"},
    "text": {"errors", "files", "gguf", "request"},
    "gguf": {"errors", "files"},
    "pages": set(),
    "progress": set(),
    "machine": set(),
    "_cpu": set(),  # built from csrc
    "ops": {"errors", "machine", "_cpu"},
    "parallel": {"errors", "machine", "_cpu", "ops"},
    "nn": {"errors", "ops"},
    "moe": {"errors", "ops", "parallel", "nn"},
    "models": {"errors", "files", "gguf", "pages", "ops", "nn", "moe"},
    "quantize": {"errors", "files", "gguf", "progress", "text", "ops", "models"},
    "engine": {
        "__version__",
        "errors",
        "logs",
        "files",
        "machine",
        "pages",
        "request",
        "schedule",
        "text",
        "ops",
        "parallel",
        "nn",
        "moe",
        "models",
        "progress",
        "quantize",
    },
    "front": {"errors", "request", "text", "engine"},
    "cluster": {
        "errors",
        "logs",
        "machine",
        "request",
        "parallel",
        "moe",
        "models",
        "engine",
        "front",
    },
    "llm": {"errors", "logs", "files", "request", "text", "engine", "front", "cluster", "models"},
    "server": {"__version__", "errors", "files", "request", "text", "engine", "front"},
    "bench": {
        "errors",
        "files",
        "progress",
        "request",
        "schedule",
        "text",
        "ops",
        "moe",
        "models",
        "engine",
        "inspect",
        "llm",
    },
    "inspect": {"errors", "files", "progress", "text", "ops", "nn", "moe", "models", "quantize"},
    "train": {"errors", "files", "text", "ops", "nn", "moe", "models", "inspect"},
}
# What starts all else, and may import it: commands, and what Ray Serve starts.
FRONT_DOORS = ("cli", "ray", "__init__", "__main__")
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_follow_the_arrows() -> None:
    against = {}
    for path in FILES:
        package = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if package in FRONT_DOORS:
            continue
        assert package in ARROWS, f"{package} has no place among the arrows"
        own = {name.split(".")[1] for name in imported(parsed(path)) if name.startswith("moebius.")}
        against[path.relative_to(SOURCE).as_posix()] = own - ARROWS[package] - {package}
    assert {path: packages for path, packages in against.items() if packages} == {}


def test_ray_is_imported_where_ray_is_used() -> None:
    """In the files that are named for it, and inside their functions: it is an extra."""
    used = set()
    for path in FILES:
        tree = parsed(path)
        if any(name.split(".")[0] in ("ray", "grpc") for name in imported(tree)):
            used.add(path.relative_to(SOURCE).as_posix())
        at_once = ast.Module([each for each in tree.body if not isinstance(each, DEFERRED)], [])
        roots = {name.split(".")[0] for name in imported(at_once)}
        assert not roots & {"ray", "grpc"}, f"{path.name} needs Ray to be imported"
    assert used == {
        "cluster/ray_actor.py",
        "cluster/ray_authentication.py",
        "cluster/ray_cluster.py",
        "ray.py",
    }


def test_what_benchmarks_import_of_each_other_is_not_hidden_by_tests() -> None:
    """All of these folders are on the tests' path, and the first of a name is found."""
    root = SOURCE.parent.parent
    wanted = {
        name.split(".")[0]
        for path in (root / "benchmarks").rglob("*.py")
        for name in imported(parsed(path))
    }
    own = {path.stem for path in (root / "benchmarks").iterdir()} & wanted
    assert "overload" in own
    first = {
        path.stem for folder in ("src", "tests", "recipes") for path in (root / folder).iterdir()
    }
    assert not own & first


# Statements that import nothing when a file is imported.
DEFERRED = (ast.FunctionDef, ast.ClassDef, ast.If)


@pytest.mark.parametrize("package", ["server", "front"])
def test_an_engine_is_reached_through_its_client_alone(package: str) -> None:
    """What knows text sees the records that cross to an engine, and nothing of how it computes."""
    for path in sorted((SOURCE / package).rglob("*.py")):
        names = imported(parsed(path))
        of_engine = {name.split(".")[2] for name in names if name.startswith("moebius.engine.")}
        assert of_engine <= {"client", "faults", "interrupts"}, f"{path.name} imports {of_engine}"


# A JSON object, whose values are checked by whoever reads them.
JSON = {"Mapping[str, Any]", "dict[str, Any]"}
TYPED = (
    "request",
    "schedule",
    "ops",
    "parallel",
    "nn",
    "moe",
    "models",
    "engine",
    "front",
    "cluster",
)
# What makes of config.json's values what they have to be.
READS_VALUES = {"models/parts.py", "models/reading.py"}


def annotations(node: ast.AST) -> Iterator[ast.expr]:
    """Those of what can be used from elsewhere: public functions, classes and their fields."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.ClassDef(name=name) if not name.startswith("_"):
                yield from annotations(child)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                if name.startswith("_") and name != "__init__":
                    continue
                args = child.args
                named = [*args.posonlyargs, *args.args, *args.kwonlyargs]
                given = [arg.annotation for arg in named]
                yield from filter(None, [*given, child.returns])
            case ast.AnnAssign(target=ast.Name(id=name)) if not name.startswith("_"):
                yield child.annotation


def untyped(tree: ast.AST) -> set[str]:
    """Annotations with an `Any` that is not of a JSON object."""
    found = set()
    for annotation in annotations(tree):
        text = ast.unparse(annotation)
        for known in JSON:
            text = text.replace(known, "")
        if re.search(r"\bAny\b", text):
            found.add(ast.unparse(annotation))
    return found


def test_no_any_crosses_the_border_of_a_package() -> None:
    found = {}
    for path in FILES:
        name = path.relative_to(SOURCE).as_posix()
        if name.startswith(TYPED) and name not in READS_VALUES:
            found[name] = untyped(parsed(path))
    assert {name: kinds for name, kinds in found.items() if kinds} == {}


def test_an_any_is_found() -> None:
    text = (
        "def f(a: int, *, b: list[Any]) -> dict[str, Any]: ...\n"
        "def _g(a: Any): ...\n"
        "class A:\n    x: Any | None\n    def h(self) -> Any: ...\n"
    )
    assert untyped(ast.parse(text)) == {"list[Any]", "Any | None", "Any"}


def test_the_arrows_have_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(ARROWS):
        ready = {name for name, needs in ARROWS.items() if name not in done and needs <= done}
        assert ready, f"a cycle among {set(ARROWS) - done}"
        done |= ready


def test_no_pickle_no_eval_no_remote_code() -> None:
    for path in FILES:
        roots = {name.split(".")[0] for name in imported(parsed(path))}
        assert not roots & FORBIDDEN_MODULES, path
        for node in ast.walk(parsed(path)):
            assert not is_forbidden(node), f"{path}:{node.lineno}"  # type: ignore[attr-defined]


def is_forbidden(node: ast.AST) -> bool:
    """A call that runs or unpickles what it is given, or an argument that lets a library do so."""
    if isinstance(node, ast.keyword):
        return node.arg == "trust_remote_code"
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Name):
        return node.func.id in FORBIDDEN_CALLS
    if isinstance(node.func, ast.Attribute) and node.func.attr in ("load", "save"):
        return ast.unparse(node.func) in ("torch.load", "torch.save", "torch.hub.load")
    return False


def test_the_scheduler_knows_no_tensor_and_no_clock() -> None:
    for path in (SOURCE / "schedule").glob("*.py"):
        roots = {name.split(".")[0] for name in imported(parsed(path))}
        assert not roots & {"torch", "numpy", "time", "asyncio", "socket", "datetime"}, path.name


def commands(group: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every command below `group`, by the words that call it."""
    for name, command in group.commands.items():
        full = f"{path} {name}".strip()
        yield full, command
        if hasattr(command, "commands"):
            yield from commands(command, full)


def environment_variables() -> set[str]:
    """Names that the source reads from the environment, itself or by an option's `envvar`."""
    found: set[str] = set()
    for path in FILES:
        for node in ast.walk(parsed(path)):
            match node:
                case ast.keyword(arg="envvar", value=names):
                    found |= {
                        each.value for each in ast.walk(names) if isinstance(each, ast.Constant)
                    }
                case ast.Call(func=called, args=[name, *_]) if ast.unparse(called) in READS:
                    assert isinstance(name, ast.Constant), (
                        f"{path}: which variable is read cannot be seen"
                    )
                    found.add(name.value)
                case ast.Subscript(value=read, slice=name) if ast.unparse(read) == "os.environ":
                    assert isinstance(name, ast.Constant), (
                        f"{path}: which variable is read cannot be seen"
                    )
                    found.add(name.value)
    return found


READS = ("os.environ.get", "os.getenv", "os.environ.setdefault", "os.environ.pop")
# torchrun's own, by which processes of a training find each other, and what NCCL and cuBLAS are told
# by; nobody sets them by hand.
FOREIGN = {"WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
FOREIGN |= {"TORCH_NCCL_BLOCKING_WAIT", "TORCH_NCCL_ASYNC_ERROR_HANDLING"}
FOREIGN |= {"NCCL_SOCKET_IFNAME", "CUBLAS_WORKSPACE_CONFIG"}
# Ray's own, by which its programs find a cluster that runs already.
FOREIGN |= {"RAY_ADDRESS"}
# OpenTelemetry's own, which a host sets for all programs; whoever has no collector knows none.
FOREIGN |= {"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_SERVICE_NAME"}


def test_options_are_counted() -> None:
    """Under 60 for serve and LLM together, the environment's among them; fewer for every other
    command, bench's too."""
    from moebius.cli.commands import app
    from moebius.engine.config import EngineConfig

    found = commands(typer.main.get_command(app))
    counts = {name: {option.name for option in command.params} for name, command in found}
    assert {"serve", "plan", "bench serve", "bench latency"} <= set(counts)
    serve_and_llm = (
        counts.pop("serve")
        | set(EngineConfig.__dataclass_fields__)
        | environment_variables() - FOREIGN
    )
    assert len(serve_and_llm) < 60
    assert {name: len(options) for name, options in counts.items() if len(options) >= 32} == {}


def test_light_imports_stay_light() -> None:
    """The package, its command line's help, the scheduler and a server's front do not wait for
    torch."""
    code = (
        f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r})\n"
        "import moebius, moebius.cluster.engines, moebius.schedule.scheduler, moebius.text, moebius.engine.wire, "
        "moebius.cli.commands, moebius.engine.supervisor, moebius.server.run, moebius.server.app\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_front_of_one_engine_starts_it_without_torch() -> None:
    """All that `serve` does before and beside the start of its engine's process."""
    code = (
        f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r})\n"
        "from moebius.cli.hosts import HostOptions\n"
        "from moebius.cli.ranks import listening\n"
        "from moebius.engine.config import EngineConfig\n"
        "with listening(HostOptions()) as assembly:\n"
        "    assert assembly.ranks_here(EngineConfig()) == 1\n"
        "import moebius.cluster.engines, moebius.models.hub\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
