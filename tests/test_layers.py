"""The house keeps its order: who may import whom, who may talk to DeepSpeed and to the environment."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "zeroaccel"

# From left to right: a room imports from rooms to its left only.
ROOMS = [
    ("errors", "lazy", "logging"),
    ("config",),
    ("state",),
    ("distributed",),
    ("data_loader",),
    ("engine",),
    ("checkpoint",),
    ("tracking",),
    ("accelerator",),
    ("launchers", "commands", "test_utils"),
]
# Everything else at the top is a facade: it re-exports, and nothing in the rooms imports it.
FACADES = len(ROOMS)

# The methods of the plugin that reach into engine/zero3.py, and the logger's reading of the log level.
UPWARD = {
    ("config/plugin.py", "zeroaccel.engine.zero3", "set_moe_leaf_modules"),
    ("config/plugin.py", "zeroaccel.engine.zero3", "set_deepspeed_weakref"),
    ("config/plugin.py", "zeroaccel.engine.zero3", "zero3_init_context_manager"),
    ("logging.py", "zeroaccel.config", ""),
}
DEEPSPEED_OUTSIDE = {("config/schema.py", True)}  # inside a function only
ENVIRONMENT = ("config/environment.py", "config/env_patch.py", "commands/")


@dataclass(frozen=True)
class Import:
    """One import: file, module, and the function that it stands in ("" at the top level)."""

    file: str
    module: str
    function: str
    typing_only: bool


def files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(path: Path) -> Iterator[Import]:
    def walk(node: ast.AST, function: str, typing_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside, only = function, typing_only
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inside = child.name
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                only = True
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(relative(path), alias.name, inside, only)
            if isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{relative(path)}: relative imports hide the room"
                module = child.module or ""
                names = [f"{module}.{alias.name}" for alias in child.names] if module == "zeroaccel" else [module]
                for name in names:
                    yield Import(relative(path), name, inside, only)
            yield from walk(child, inside, only)

    yield from walk(ast.parse(path.read_text()), "", False)


ALL_IMPORTS = [found for path in files() for found in imports_of(path)]


def floor(name: str) -> int:
    """Number of the room that a path or a dotted name below `zeroaccel` belongs to."""
    room = name.replace(".py", "").split("/")[0].split(".")[0]
    return next((number for number, rooms in enumerate(ROOMS) if room in rooms), FACADES)


def test_rooms_import_from_their_left_only() -> None:
    wrong = []
    for found in ALL_IMPORTS:
        if not found.module.startswith("zeroaccel.") or (found.file, found.module, found.function) in UPWARD:
            continue
        if floor(found.module.removeprefix("zeroaccel.")) > floor(found.file):
            wrong.append(f"{found.file} imports {found.module}")
    assert not wrong, "\n".join(wrong)


def test_every_exception_to_the_order_is_still_needed() -> None:
    present = {(found.file, found.module, found.function) for found in ALL_IMPORTS}
    assert present >= UPWARD


def test_no_module_imports_itself_in_a_circle() -> None:
    modules = {relative(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__") for path in files()}
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for found in ALL_IMPORTS:
        source = found.file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        target = found.module.removeprefix("zeroaccel.")
        if target != found.module and target in modules and not found.function and not found.typing_only:
            graph[source].add(target)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' -> '.join([*path, module])}"
        if module in done:
            return
        for target in sorted(graph[module]):
            visit(target, (*path, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_only_the_engine_talks_to_deepspeed() -> None:
    wrong = [
        f"{found.file} imports {found.module}"
        for found in ALL_IMPORTS
        if found.module.split(".")[0] == "deepspeed"
        and not found.file.startswith("engine/")
        and (found.file, bool(found.function)) not in DEEPSPEED_OUTSIDE
    ]
    assert not wrong, "\n".join(wrong)


def test_config_is_pure() -> None:
    """No torch.distributed and no engine in config/; torch at most inside a function."""
    wrong = [
        f"{found.file} imports {found.module}"
        for found in ALL_IMPORTS
        if found.file.startswith("config/")
        and found.module.split(".")[0] == "torch"
        and (not found.function or "distributed" in found.module)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_environment_is_read_in_one_place() -> None:
    wrong = [
        relative(path)
        for path in files()
        if not relative(path).startswith(ENVIRONMENT)
        and any(
            getattr(node, "attr", getattr(node, "name", "")) in ("environ", "getenv", "putenv")
            for node in ast.walk(ast.parse(path.read_text()))
        )
    ]
    assert not wrong, f"{wrong} touch os.environ: use config/environment.py"


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring and signature."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", files(), ids=relative)
def test_functions_are_short(path: Path) -> None:
    longest = 10 if relative(path) == "accelerator.py" else 60
    tree = ast.parse(path.read_text())
    if longest == 10:
        (tree,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Accelerator"]  # type: ignore[assignment]
    too_long = {
        node.name: code_lines(node)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and code_lines(node) > longest
    }
    too_long.pop("__init__", None) if longest == 10 else None  # it stores its arguments
    assert not too_long, f"{relative(path)}: {too_long}, at most {longest} lines of code"


def test_the_checks_can_fail(tmp_path: Path) -> None:
    assert floor("config/auto.py") < floor("engine.deepspeed")
    assert floor("utils/operations.py") == FACADES
    module = ast.parse("def long():\n" + "    x = 1\n" * 61)
    assert code_lines(module.body[0]) == 61  # type: ignore[arg-type]
