"""Code rules that a test can check: imports, sizes, names and docstrings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from roll_gspo.config.strategy import STRATEGIES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "roll_gspo"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = {
    **dict.fromkeys(("errors", "printable", "registry", "declarations", "metrics", "episode"), 0),
    **dict.fromkeys(("batch", "rollout_files", "rendezvous"), 0),
    **dict.fromkeys(("config", "algorithms", "sandbox", "scheduling", "workers"), 1),
    **dict.fromkeys(("execution", "data", "rewards", "tools", "models", "tracking", "report", "checkpoint"), 2),
    **dict.fromkeys(("strategies", "compare", "environments"), 3),
    "roles": 4,
    **dict.fromkeys(("pipelines", "sweep", "command_line"), 5),
    **dict.fromkeys(("run", "export"), 6),
    **dict.fromkeys(("evaluation", "simulate", "doctor"), 7),
    **dict.fromkeys(("api", "evaluate"), 8),
}
COMMANDS = {"roll_gspo/rewards/__main__.py": "export"}  # reads data too, and nothing imports it
# Each may import later ones.
BOTTOM = (
    *("rendezvous", "rollout_files", "metrics", "batch", "episode"),
    *("declarations", "registry", "printable", "errors"),
)
ALLOWED = {  # stricter than their layer
    "config": ("declarations", "registry", "printable", "errors"),
    "algorithms": ("batch", "declarations", "metrics", "errors"),
    "compare": ("report", "printable", "errors"),
    "sandbox": ("errors",),
    "scheduling": ("errors",),
}
ENGINES = {
    "megatron": "roll_gspo/strategies/megatron",
    "vllm": "roll_gspo/strategies/vllm",
    "ray": "roll_gspo/execution/ray",
}
MAX_LINES_OF_FILE, MAX_LINES_OF_FUNCTION = 400, 60


@cache
def trees() -> tuple[tuple[str, ast.Module], ...]:
    """Return the path relative to the repository and the syntax tree of every file of the package."""
    return tuple((str(file.relative_to(ROOT)), ast.parse(file.read_text(encoding="utf-8"))) for file in FILES)


def imports_of(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, module) of every import anywhere in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports are absolute here"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if is_module(name)}
            yield from ((node.lineno, name) for name in sorted(modules))
            if names - modules:
                yield node.lineno, str(node.module)


def is_module(name: str) -> bool:
    """Return whether `name` is a module of this package."""
    file = ROOT.joinpath(*name.split("."))
    return name.startswith("roll_gspo.") and (file.with_suffix(".py").is_file() or file.is_dir())


def part(name: str) -> str:
    """Return the top-level part of a module: `roles` for `roll_gspo.roles.actor` or `roll_gspo/roles/actor.py`."""
    if name in COMMANDS:
        return COMMANDS[name]
    pieces = name.removesuffix(".py").replace("/", ".").split(".")
    return pieces[1] if len(pieces) > 1 and pieces[1] != "__init__" else ""


def own_imports() -> Iterator[tuple[str, int, str]]:
    """Yield (path, line, imported module) of every import within the package."""
    for path, tree in trees():
        yield from ((path, line, name) for line, name in imports_of(path, tree) if name.split(".")[0] == "roll_gspo")


def may_import(importer: str, imported: str) -> bool:
    """Return whether a part may import another."""
    if not imported or importer == imported:  # the root holds only the version
        return True
    if importer in ALLOWED:
        return imported in ALLOWED[importer]
    if importer in BOTTOM and imported in BOTTOM:
        return BOTTOM.index(importer) < BOTTOM.index(imported)
    return LAYERS[importer] > LAYERS[imported]


def test_every_part_has_a_layer() -> None:
    assert {part(path) for path, _ in trees()} - {""} == set(LAYERS)


def test_imports_point_down() -> None:
    wrong = [
        f"{path}:{line} imports {name} (layer {LAYERS[part(name)]}) from layer {LAYERS[part(path)]}"
        for path, line, name in own_imports()
        if part(path) and not may_import(part(path), part(name))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        *(("roles", "strategies", True), ("strategies", "roles", False), ("pipelines", "roles", True)),
        *(("data", "rewards", False), ("rewards", "data", False), ("config", "algorithms", False)),
        *(("config", "registry", True), ("config", "batch", False), ("algorithms", "registry", False)),
        *(("metrics", "batch", True), ("batch", "metrics", False), ("errors", "registry", False)),
        *(("compare", "report", True), ("report", "compare", False), ("compare", "config", False)),
        *(("run", "pipelines", True), ("pipelines", "run", False), ("models", "config", True)),
    ],
)
def test_rule_of_imports(importer: str, imported: str, allowed: bool) -> None:
    assert may_import(importer, imported) is allowed


def test_no_import_cycles() -> None:
    graph: dict[str, set[str]] = {}
    for path, _, name in own_imports():
        module = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        if is_module(name) and name != module:
            graph.setdefault(module, set()).add(name)
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for imported in sorted(graph.get(module, ())):
                visit(imported, (*above, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_engine_folders_are_imported_by_themselves_only() -> None:
    """The rest of the package knows an engine by its registered args class."""
    folders = {target.rpartition(".")[0] for target in STRATEGIES.values()}
    wrong = [
        f"{path}:{line} imports {name}; use what config/strategy.py declares"
        for path, line, name in own_imports()
        for folder in folders
        if f"{name}.".startswith(f"{folder}.") and not path.startswith(folder.replace(".", "/"))
    ]
    assert not wrong, "\n".join(wrong)


def test_engines_are_named_in_the_registry_only() -> None:
    wrong = [
        f"{path}:{node.lineno}: '{node.value}'"
        for path, tree in trees()
        if path != "roll_gspo/config/strategy.py" and part(path) != "strategies"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in STRATEGIES
    ]
    assert not wrong, "\n".join(wrong)


def test_engines_are_imported_in_one_folder_each() -> None:
    wrong = [
        f"{path}:{line} imports {name}; only {ENGINES[name.split('.')[0]]} may"
        for path, tree in trees()
        for line, name in imports_of(path, tree)
        if name.split(".")[0] in ENGINES and not path.startswith(ENGINES[name.split(".")[0]])
    ]
    assert not wrong, "\n".join(wrong)


def test_algorithms_import_torch_and_nothing_else_from_outside() -> None:
    standard = {"__future__", "collections", "dataclasses", "enum", "functools", "math", "typing"}
    wrong = [
        f"{path}:{line} imports {name}"
        for path, tree in trees()
        for line, name in imports_of(path, tree)
        if part(path) == "algorithms" and name.split(".")[0] not in {"torch", "roll_gspo", *standard}
    ]
    assert not wrong, "\n".join(wrong)


def test_files_and_functions_stay_small() -> None:
    wrong = []
    for path, tree in trees():
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES_OF_FILE:
            wrong.append(f"{path}: {lines} lines, more than {MAX_LINES_OF_FILE}")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_LINES_OF_FUNCTION:
                    wrong.append(f"{path}:{node.lineno}: {node.name} has {length} lines")
    assert not wrong, "\n".join(wrong)


def test_attributes_are_known_and_not_probed() -> None:
    wrong = [
        f"{path}:{node.lineno}: {node.func.id}"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and (node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) > 2))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_is_called_utils() -> None:
    assert not [str(file) for file in PACKAGE.rglob("*") if file.stem in ("utils", "util", "helpers", "common", "misc")]


def test_public_names_have_docstrings() -> None:
    wrong = []
    for path, tree in trees():
        if not ast.get_docstring(tree):
            wrong.append(f"{path}:1: the module")
        for node in public_definitions(tree):
            if not ast.get_docstring(node):
                wrong.append(f"{path}:{node.lineno}: {node.name}")
    assert not wrong, "no docstring:\n" + "\n".join(wrong)


def public_definitions(tree: ast.Module) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield public classes, functions, and methods of public classes without a base class."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef) and not node.bases:  # the base class documents inherited methods
                yield from (
                    item
                    for item in node.body
                    if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and not item.name.startswith("_")
                )


def test_module_level_imports_need_no_engine() -> None:
    """run.py reaches neither engines nor torch nor transformers by module-level imports."""
    heavy = {"torch", "transformers", "vllm", "megatron", "ray", "tensorboard", "matplotlib", "plotly"}
    args_classes = [target.partition(":")[0] for target in STRATEGIES.values()]
    todo, seen, wrong = ["roll_gspo.run", "roll_gspo.pipelines.plan", *args_classes], set(), []
    while todo:
        module = todo.pop()
        file = ROOT.joinpath(*module.split("."))
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        tree = ast.parse(file.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        for line, name in imports_of(str(file), tree):
            if name.split(".")[0] in heavy:
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
            elif is_module(name) and name not in seen:
                seen.add(name)
                todo.append(name)
    assert not wrong, "\n".join(wrong)
