"""The text: docstrings of Python's standard library, read from its source files (parsed, never imported)."""

import ast
import dataclasses
import pathlib
import sysconfig

# tests and bundled applications say little about the library, and differ most between distributions
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "ensurepip", "lib2to3"}


@dataclasses.dataclass(frozen=True)
class Docstring:
    file: str  # relative to the library's folder; the train/held-out split is by file
    name: str
    kind: str  # "function", "method" or "class"
    text: str
    returns: bool  # the code returns a value
    raises: bool  # the code raises

    @property
    def module(self):
        """Top-level module or package."""
        return self.file.split("/")[0].removesuffix(".py")


def collect(progress=iter):
    """All docstrings of functions, methods and classes, in the same order on every run, each text once."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(library.rglob("*.py")) if not SKIPPED & set(path.relative_to(library).parts)]
    found, seen = [], set()
    for path in progress(files):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # a template or a file for another Python
        for item in _walk(tree, path.relative_to(library).as_posix(), in_class=False):
            if item.text not in seen:
                seen.add(item.text)
                found.append(item)
    return found


def _walk(node, file, in_class):
    for child in ast.iter_child_nodes(node):
        is_class = isinstance(child, ast.ClassDef)
        if is_class or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            text = " ".join((ast.get_docstring(child) or "").split())
            if text:
                kind = "class" if is_class else "method" if in_class else "function"
                yield Docstring(file, child.name, kind, text, *_effects(child))
        yield from _walk(child, file, is_class)


def _effects(node):
    """Whether a function's own code (not that of a nested one) returns a value, and whether it raises."""
    returns = raises = False
    waiting = list(ast.iter_child_nodes(node))
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        returns |= isinstance(inner, ast.Return) and inner.value is not None
        raises |= isinstance(inner, ast.Raise)
        waiting += ast.iter_child_nodes(inner)
    return returns, raises
