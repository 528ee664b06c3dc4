"""The house rules: who may import whom, how large a part may be, which names are public."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "quire": ROOT / "core/quire",
    "quire_kernels": ROOT / "csrc/quire_kernels",
    "quire_attention": ROOT / "plugins/attention/quire_attention",
    "quire_grammar": ROOT / "plugins/grammar/quire_grammar",
    "quire_models": ROOT / "plugins/models/quire_models",
    "quire_parsers": ROOT / "plugins/parsing/quire_parsers",
    "quire_quant": ROOT / "plugins/quant/quire_quant",
    "quire_sampling": ROOT / "plugins/sampling/quire_sampling",
}
SOURCES = sorted(path for folder in PACKAGES.values() for path in folder.rglob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ENTRY_POINTS: dict[str, str] = PYPROJECT["project"]["entry-points"]["quire"]

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
MAX_KERNEL_LINES = 150
MAX_ARGUMENTS = 7
MAX_NESTING = 3

# An operation's tensors come one by one, which makes one argument more.
ARGUMENTS_OF_A_CONTRACT = {"attend": 8, "rotate_and_write": 8}

# What is over a budget today: "file:function: what". Take lines away, never add one.
OVER_BUDGET: set[str] = set()

BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.TryStar, ast.Match)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def relative(path: Path) -> str:
    """Return a path as the repository names it."""
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """Return how a source file is imported."""
    package = next(folder for folder in PACKAGES.values() if path.is_relative_to(folder))
    name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


def modules(*parts: str) -> list[str]:
    """Return the names of the modules in the given packages or modules."""
    names = [module_name(path) for path in SOURCES if path.name != "__main__.py"]
    return [n for n in names if any(n == part or n.startswith(part + ".") for part in parts)]


def contracts() -> list[dict[str, Any]]:
    """Return the import contracts of pyproject.toml."""
    return PYPROJECT["tool"]["importlinter"]["contracts"]


def test_import_contracts_are_kept(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)

    failed = lint_imports(config_filename="pyproject.toml", no_cache=True, no_logo=True)

    assert not failed, capfd.readouterr().out


def test_import_contracts_cover_every_part_of_the_house() -> None:
    named = {name for contract in contracts() for name in contract.get("protected_modules", [])}
    named |= {"quire.errors", "quire.config", "quire.request", "quire.__main__"}
    parts = {".".join(module_name(path).split(".")[:2]) for path in SOURCES}

    inside = {part for part in parts if part.startswith("quire.")}

    assert inside - named == set()
    assert set(PACKAGES) - named == {"quire"}


def test_import_contracts_keep_every_plugin_apart() -> None:
    [apart] = [contract for contract in contracts() if contract["type"] == "independence"]

    assert apart["modules"] == sorted(ENTRY_POINTS.values())


TORCH_FREE = {
    "import quire": ["quire"],
    "foundations": modules("quire.errors", "quire.config", "quire.request"),
    "scheduling": modules("quire.scheduling"),
    "text": modules("quire.text"),
    "hooks": modules("quire.hooks", "quire.interfaces.plugin", "quire.interfaces.model_config"),
    "front door": modules("quire.cli", "quire.frontend", "quire.preparation"),
    "package roots": sorted(PACKAGES),
    **{name: [module] for name, module in ENTRY_POINTS.items()},
}


@pytest.mark.parametrize("part", TORCH_FREE)
def test_torch_free_parts_load_no_torch(part: str) -> None:
    program = "\n".join(
        [
            "import importlib, sys",
            f"for name in {TORCH_FREE[part]!r}: importlib.import_module(name)",
            "heavy = {'torch', 'triton', 'transformers'} & set(sys.modules)",
            "sys.exit(f'loaded: {heavy}' if heavy else 0)",
        ]
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("plugin", ENTRY_POINTS)
def test_own_plugins_declare_the_api_version_they_were_written_for(plugin: str) -> None:
    """A literal: a plugin that repeats `API_VERSION` would follow Quire whatever happens."""
    [path] = [path for path in SOURCES if module_name(path) == ENTRY_POINTS[plugin]]

    assert re.search(r"^QUIRE_API_VERSION = \(\d+, \d+\)$", path.read_text(), re.MULTILINE)


def functions(path: Path) -> Iterator[tuple[str, Function]]:
    """Yield every function of a file with its dotted name."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, Function | ast.ClassDef):
                yield from walk(child, prefix)
                continue
            name = prefix + child.name
            if isinstance(child, Function):
                yield name, child
            yield from walk(child, name + ".")

    return walk(ast.parse(path.read_text()), "")


def is_kernel(function: Function) -> bool:
    """Answer whether a function is compiled for a device, which makes long signatures natural."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def depth(node: ast.AST) -> int:
    """Return how deep blocks are nested in a function; an elif is no deeper than its if."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        own = 1 if isinstance(child, BLOCKS) and not is_elif else 0
        deepest = max(deepest, own + depth(child))
    return deepest


def num_arguments(function: Function) -> int:
    """Count a function's arguments, without self and cls."""
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def over_budget(path: Path) -> Iterator[str]:
    """Yield what a file has over its budgets."""
    num_lines = len(path.read_text().splitlines())
    if num_lines > MAX_FILE_LINES:
        yield f"{relative(path)}: {num_lines} lines"
    for name, function in functions(path):
        place, kernel = f"{relative(path)}:{name}", is_kernel(function)
        length = (function.end_lineno or 0) - function.lineno + 1
        if length > (MAX_KERNEL_LINES if kernel else MAX_FUNCTION_LINES):
            yield f"{place}: {length} lines"
        allowed = ARGUMENTS_OF_A_CONTRACT.get(function.name, MAX_ARGUMENTS)
        if num_arguments(function) > allowed and not kernel:
            yield f"{place}: {num_arguments(function)} arguments"
        if depth(function) > MAX_NESTING and not kernel:
            yield f"{place}: nesting {depth(function)}"


def test_budgets_of_size_hold_and_only_shrink() -> None:
    found = {line for path in SOURCES for line in over_budget(path)}

    assert found == OVER_BUDGET


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(self, a, b, c, d, e, *, f, g): pass", []),
        ("def f(a, b, c, d, e, f, g, /, h): pass", ["f: 8 arguments"]),
        ("def f():\n" + "    x = 1\n" * 50, ["f: 51 lines"]),
        ("@triton.jit\ndef f(a, b, c, d, e, f, g, h):\n" + "    x = 1\n" * 60, []),
        ("def f():\n if a:\n  for b in c:\n   with d:\n    if e: pass", ["f: nesting 4"]),
        ("def f():\n if a:\n  pass\n elif b:\n  for c in d:\n   if e: pass", []),
        ("x = 1\n" * 401, [" 401 lines"]),
    ],
)
def test_budgets_are_measured_as_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, expected: list[str]
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "x.py"
    path.write_text(source)

    assert [line.removeprefix("x.py:") for line in over_budget(path)] == expected


UNSAFE_MODULES = {"pickle", "marshal", "dill", "shelve", "cloudpickle", "joblib", "_pickle"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "torch.load"}


def unsafe(path: Path) -> Iterator[str]:
    """Yield what could run code that a file or a client brings."""
    for node in ast.walk(ast.parse(path.read_text())):
        imported: list[str] = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [node.module or ""]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE_CALLS:
            yield f"line {node.lineno}: {ast.unparse(node.func)}"
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield f"line {node.lineno}: allow_pickle"
        for name in imported:
            if name.split(".")[0] in UNSAFE_MODULES:
                yield f"line {node.lineno}: {name}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_product_code_never_unpickles_or_evaluates(path: Path) -> None:
    assert list(unsafe(path)) == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_product_files_are_named_for_what_they_hold(path: Path) -> None:
    assert path.stem not in {"utils", "util", "helpers", "common", "misc", "base", "core"}


def public_names(path: Path) -> list[str]:
    """Return what a module defines without an underscore, in alphabetical order."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, Function | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return sorted(name for name in names if not name.startswith("_"))


def test_public_names_of_the_plugin_api_are_pinned() -> None:
    """A difference is a change of the API: see `Versions` in docs/hooks.md, then edit the file."""
    pinned = (ROOT / "tests/public_names.txt").read_text().splitlines()
    api = [
        path
        for path in SOURCES
        if module_name(path).startswith(
            ("quire.interfaces", "quire.testing.kit", "quire_kernels.ops", "quire_kernels.native")
        )
    ]

    found = [f"{module_name(path)}: {' '.join(public_names(path))}".strip() for path in api]

    assert found == pinned


def test_public_names_of_quire_are_pinned_and_exist() -> None:
    import quire

    assert quire.__all__ == [
        "LLM",
        "AsyncEngine",
        "BeamSearchParams",
        "CompletionOutput",
        "PoolingParams",
        "RequestOutput",
        "SamplingParams",
        "__version__",
        "hookimpl",
    ]
    assert [name for name in quire.__all__ if getattr(quire, name, None) is None] == []
    assert set(quire.__all__) <= set(dir(quire))


def test_public_names_of_quire_give_the_nearest_for_a_typo() -> None:
    import quire

    with pytest.raises(AttributeError) as caught:
        _ = quire.SamplingParam

    assert str(caught.value) == (
        "module 'quire' has no attribute 'SamplingParam'. Did you mean 'SamplingParams'?"
    )


def committed_texts() -> list[Path]:
    """Return the repository's text files; without git (an unpacked sdist), all of them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        paths = [ROOT / line for line in listed.stdout.splitlines()]
    else:
        made = re.compile(r"\.venv|\.\w+_cache|\.hypothesis|__pycache__")
        paths = [p for p in ROOT.rglob("*") if not any(map(made.fullmatch, p.parts))]
    suffixes = {"", ".py", ".md", ".toml", ".txt", ".json", ".jinja", ".yml", ".cu", ".cpp", ".h"}
    return [path for path in paths if path.is_file() and path.suffix in suffixes]


def test_committed_files_name_no_path_of_a_machine() -> None:
    path_of_a_machine = re.compile(r"(?<![\w.])/(root|home|work|Users)/[a-z]")
    own_home = re.compile(re.escape(os.path.expanduser("~") + "/"))

    found = [
        relative(path)
        for path in committed_texts()
        for pattern in (path_of_a_machine, own_home)
        if pattern.search(path.read_text(errors="replace"))
    ]

    assert found == []
