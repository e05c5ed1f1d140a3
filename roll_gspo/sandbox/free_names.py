"""The names that unit tests see: which of them come from the program, decided from the tests alone.

The tests' own definitions, imports, built-in functions and the names of the preamble come first. The program provides
what remains. Otherwise, a program could replace `abs`, `all` or `isclose` in the tests.
"""

from __future__ import annotations

import ast
import builtins
import collections
import importlib
import importlib.util
import re
import symtable
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SOLUTION = "solution"
_ALIASES = {"np": "numpy", "pd": "pandas"}


@dataclass(frozen=True)
class FreeNames:
    """Names in the sources of tests.

    Attributes:
        own: names that the program has to define.
        mentioned: words in strings, which may name a function of the program, e.g. in `globals()["f"]`.
        imported: names that the tests import from `solution`.
        modules: modules that the tests use without importing them, by name.
    """

    own: frozenset[str]
    mentioned: frozenset[str]
    imported: frozenset[str]
    modules: Mapping[str, Any]

    @property
    def classes(self) -> set[str]:
        """Names in `own` or `imported` that name classes by convention."""
        return {name for name in self.own | self.imported if name.lstrip("_")[:1].isupper()}


def find_names(sources: Sequence[str], trees: Sequence[ast.Module], preamble: Mapping[str, Any]) -> FreeNames:
    """Return the names in tests.

    A task may have a name of the preamble (`median`) or a built-in name (`sum`). If the tests use no other name that
    the program could define, it is the name that they use most often.

    Args:
        sources: source codes of the tests.
        trees: syntax trees of `sources`.
        preamble: names that tests can use without importing them.
    """
    nodes = [node for tree in trees for node in ast.walk(tree)]
    free, defined = set[str](), set[str]()
    for source in sources:
        table = symtable.symtable(source, "tests.py", "exec")
        free |= _global_names(table)
        defined |= {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    free -= defined
    modules = {name: module for name in free if (module := _module(name, nodes))}
    known = {*vars(builtins), *preamble, *modules, "__name__", "__file__"}
    own = free - known
    imported = _imported(nodes)
    if not own and not imported:
        candidates = free - modules.keys()
        own = _most_used(nodes, candidates - vars(builtins).keys()) or _most_used(nodes, candidates)
    texts = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    return FreeNames(frozenset(own), frozenset(words - known - defined), frozenset(imported), modules)


def _global_names(table: symtable.SymbolTable) -> set[str]:
    """Return the names that code uses as global names."""
    is_module = table.get_type() == "module"
    used = (s for s in table.get_symbols() if s.is_referenced() and (is_module or s.is_global()))
    return {s.get_name() for s in used}.union(*(_global_names(child) for child in table.get_children()))


def _module(name: str, nodes: Sequence[ast.AST]) -> Any:
    """Return the module that tests use without importing it (`np.array`), or None."""
    target = _ALIASES.get(name, name)
    if target not in sys.stdlib_module_names and target not in sys.modules:
        return None
    owners = {id(n.value) for n in nodes if isinstance(n, ast.Attribute)}
    uses = [node for node in nodes if isinstance(node, ast.Name) and node.id == name]
    if not all(id(node) in owners for node in uses) or not can_import(target):
        return None
    return importlib.import_module(target)


def can_import(module: str) -> bool:
    """Return whether a module is installed in the sandbox."""
    return module in sys.modules or importlib.util.find_spec(module) is not None


def _imported(nodes: Sequence[ast.AST]) -> set[str]:
    """Return the names that tests import from `solution`, or use as its attributes."""
    imports = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.module == SOLUTION and not n.level]
    names = {alias.name for node in imports for alias in node.names}
    modules = {
        alias.asname or alias.name
        for node in nodes
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == SOLUTION
    }
    attributes = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules
    }
    return (names - {"*"}) | attributes


def _most_used(nodes: Sequence[ast.AST], candidates: set[str]) -> set[str]:
    """Return the candidate that is used most often, the innermost of the first use if several are."""
    counts = collections.Counter(node.id for node in nodes if isinstance(node, ast.Name) and node.id in candidates)
    most = max(counts.values(), default=0)
    return set([name for name, count in counts.items() if count == most][-1:])


def missing_imports(trees: Sequence[ast.Module]) -> list[str]:
    """Return the modules that tests import but that are not installed in the sandbox."""
    names = set[str]()
    guarded = {id(inner) for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Try) for inner in ast.walk(n)}
    for node in (node for tree in trees for node in ast.walk(tree) if id(node) not in guarded):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return sorted(name for name in names - {SOLUTION} if not can_import(name))
