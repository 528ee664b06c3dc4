"""Native code is compiled once, kept by what it is made of, and built again where it is broken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from attrs import evolve

from quire.errors import BuildError
from quire_kernels.native import CUDA, CXX, NativeLibrary, Source

needs_compiler = pytest.mark.skipif(
    CXX.why_missing() is not None, reason=f"there is no C++ compiler: {CXX.why_missing()}"
)

ADD = '#include "step.h"\nextern "C" int add(int a) { return a + STEP; }\n'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of libraries, empty."""
    monkeypatch.setenv("QUIRE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "native"


@pytest.fixture
def adder(tmp_path: Path, cache: Path) -> NativeLibrary:
    """Return a library whose `add` adds one, not built."""
    (tmp_path / "add.cpp").write_text(ADD)
    (tmp_path / "step.h").write_text("#define STEP 1\n")
    return NativeLibrary(
        name="adder",
        sources=(Source(path=tmp_path / "add.cpp"),),
        headers=(tmp_path / "step.h",),
        flags=("-O0",),
    )


def never(line: str) -> None:
    raise AssertionError(f"it was compiled again: {line}")


@needs_compiler
def test_native_library_is_compiled_once_and_found_again(adder: NativeLibrary) -> None:
    said: list[str] = []

    assert not adder.is_built()
    assert adder.load(said.append).add(41) == 42

    assert adder.is_built()
    assert any("add.cpp" in line for line in said)
    assert adder.build(never) == adder.find()


@needs_compiler
@pytest.mark.parametrize(
    ("name", "text"),
    [("add.cpp", ADD.replace("a + STEP", "a + STEP + 4")), ("step.h", "#define STEP 5\n")],
)
def test_native_library_of_a_changed_source_or_header_is_another(
    adder: NativeLibrary, tmp_path: Path, name: str, text: str
) -> None:
    first = adder.build(print)

    (tmp_path / name).write_text(text)

    assert not adder.is_built()
    assert adder.load().add(1) == 6
    assert adder.find() != first


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        {"flags": ("-O1",)},
        {"architecture": "another"},
        {"compiler": evolve(CXX, names=("c++",))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_native_library_with_other_flags_machine_or_compiler_is_another(
    adder: NativeLibrary, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    adder.build(print)

    assert not evolve(adder, **change).is_built()


@needs_compiler
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b"\0" * 64 + path.read_bytes()[64:]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".sha256").unlink(),
    ],
    ids=["truncated", "overwritten", "empty", "removed", "without checksum"],
)
def test_native_library_that_is_damaged_is_built_again(
    adder: NativeLibrary, damage: Callable[[Path], None]
) -> None:
    path = adder.build(print)

    damage(path)

    assert not adder.is_built()
    assert adder.build(print) == path
    assert adder.load(never).add(1) == 2


BUILD = """
import sys
from pathlib import Path
from quire_kernels.native import NativeLibrary, Source
folder = Path(sys.argv[1])
library = NativeLibrary(
    name="adder",
    sources=(Source(path=folder / "add.cpp"),),
    headers=(folder / "step.h",),
    flags=("-O0",),
)
print("ready", flush=True)
sys.stdin.readline()
print(library.load(lambda line: print(line, flush=True)).add(1), flush=True)
"""


@needs_compiler
def test_native_library_that_two_processes_build_at_once_is_compiled_once(
    adder: NativeLibrary, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    for process in processes:
        assert process.stdout.readline() == "ready\n"

    told = [process.communicate("go\n", timeout=60)[0] for process in processes]

    assert [text.splitlines()[-1] for text in told] == ["2", "2"]
    assert sum("compiled in" in text for text in told) == 1
    assert adder.is_built()


@needs_compiler
def test_native_build_leaves_nothing_but_the_library_and_its_checksum(
    adder: NativeLibrary, cache: Path
) -> None:
    cache.mkdir(parents=True)
    place = adder._place()
    assert place is not None
    (cache / f"{place.stem}.killed.tmp").mkdir()

    adder.build(print)

    assert {path.suffix for path in cache.iterdir()} == {".so", ".sha256", ".lock"}


@needs_compiler
def test_native_build_that_fails_shows_the_compilers_first_error(
    adder: NativeLibrary, tmp_path: Path
) -> None:
    (tmp_path / "add.cpp").write_text(
        "int f() {\n  return first_mistake;\n}\nint g() { return b; }"
    )

    with pytest.raises(BuildError) as caught:
        adder.build(print)

    message = str(caught.value)
    assert "add.cpp:2:10: error:" in message
    assert "first_mistake" in message
    assert "g()" not in message
    assert "CXX names another compiler" in message
    assert not adder.is_built()
    assert "add.cpp:2:10: error:" in (adder.why_unusable() or "")


@needs_compiler
def test_native_build_that_failed_is_tried_again_and_forgotten(
    adder: NativeLibrary, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The same sources and compiler, which only then finds what it needs.
    (tmp_path / "add.cpp").write_text('#include "late.h"\n' + ADD)
    with pytest.raises(BuildError, match="fatal error: late.h"):
        adder.build(print)

    (tmp_path / "late.h").write_text("")

    assert adder.load().add(1) == 2
    assert adder.why_unusable() is None
    assert not list(adder.build(never).parent.glob("*.failed"))


@needs_compiler
def test_native_link_that_fails_shows_the_linkers_first_error(adder: NativeLibrary) -> None:
    missing = evolve(adder, link_flags=("-lquire_has_no_such_library",))

    with pytest.raises(BuildError, match="cannot find -lquire_has_no_such_library"):
        missing.build(print)


def test_native_build_without_a_compiler_says_which_and_how_to_get_it(
    adder: NativeLibrary, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert adder.why_unusable() == (
        "it is not built, and there is no C++ compiler (g++, clang++, c++); "
        "install g++ (`apt install g++`), or name one in CXX"
    )
    with pytest.raises(BuildError, match="there is no C\\+\\+ compiler"):
        adder.build(print)


def test_native_build_with_a_compiler_that_is_not_there_names_the_variable(
    adder: NativeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")

    with pytest.raises(BuildError, match="CXX is 'no-such-compiler -m64', which is not there"):
        adder.build(print)


@needs_compiler
def test_native_library_serves_on_after_its_compiler_has_gone(
    adder: NativeLibrary, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = adder.build(print)

    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert adder.why_unusable() is None
    assert adder.build(never) == path


def test_cuda_needs_a_host_compiler_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    for name in ("CXX", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))

    assert CUDA.command() == (str(nvcc),)
    assert "there is no C++ compiler" in (CUDA.why_missing() or "")


@needs_compiler
def test_native_build_into_a_folder_that_cannot_be_written_names_the_variable(
    adder: NativeLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUIRE_CACHE_DIR", str(tmp_path / "file"))

    with pytest.raises(BuildError, match="cannot write into .*file/native: .*QUIRE_CACHE_DIR"):
        adder.build(print)


@needs_compiler
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_native_build_into_a_read_only_folder_names_the_variable(
    adder: NativeLibrary, cache: Path
) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o500)

    with pytest.raises(BuildError, match="cannot write into .*: Permission denied"):
        adder.build(print)


@needs_compiler
def test_native_library_in_a_read_only_folder_is_loaded(adder: NativeLibrary, cache: Path) -> None:
    adder.build(print)
    cache.chmod(0o500)
    try:
        assert adder.load(never).add(1) == 2
    finally:
        cache.chmod(0o700)


def test_native_cache_is_below_the_users_cache_by_default(
    adder: NativeLibrary, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from quire_kernels.native.library import cache_folder

    monkeypatch.delenv("QUIRE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "quire" / "native"

    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "quire" / "native"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_native_library_of_cuda_compiles_and_loads(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "add.cu").write_text(
        '__global__ void kernel() {}\nextern "C" int add(int a) { return a + 1; }\n'
    )
    library = NativeLibrary(
        name="adder",
        sources=(Source(path=tmp_path / "add.cu"),),
        compiler=CUDA,
        flags=("-arch=sm_90a",),
        architecture="sm_90a",
    )

    assert library.load().add(1) == 2
