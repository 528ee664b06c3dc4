"""What `quire build flashinfer` compiles and notes, and who is told that it is not usable."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from quire.errors import BuildError
from quire_attention.flashinfer import library
from quire_attention.flashinfer.library import VARIANTS, Variant


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A Hopper GPU and the library, as far as it is asked without torch; returns the cache."""
    monkeypatch.setenv("QUIRE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(library, "version_here", lambda: "0.6.14")
    monkeypatch.setattr(library, "capability_here", lambda: (9, 0))
    monkeypatch.setattr(library, "_why_not_tools", lambda: None)
    return tmp_path


class FakeModule:
    """A module of the library, which compiles into a text."""

    is_aot = False

    def __init__(self, folder: Path, name: str, error: str | None = None) -> None:
        self.name, self.error, self.num_builds = name, error, 0
        self.build_dir, self.jit_library_path = folder, folder / f"{name}.so"

    def get_library_path(self) -> Path:
        return self.jit_library_path

    def build(self, verbose: bool) -> None:
        self.num_builds += 1
        if self.error is not None:
            raise RuntimeError(f"Ninja build failed. Ninja output:\n{self.error}")
        if not self.jit_library_path.exists():
            self.jit_library_path.write_text("whole")

    def load(self, path: Path) -> None:
        if path.read_text() != "whole":
            raise RuntimeError("cannot load")


def build(monkeypatch: pytest.MonkeyPatch, *modules: FakeModule) -> tuple[str, list[str]]:
    said: list[str] = []
    found = {module.name: module for module in modules}
    monkeypatch.setattr(library, "modules_of", lambda variant, capability: found)
    return library.build(said.append, VARIANTS[:1]), said


def test_build_compiles_and_notes_what_is_there(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = [FakeModule(installed, "one"), FakeModule(installed, "two")]
    assert not library.is_built()

    line, said = build(monkeypatch, *modules)

    assert line.startswith("2 modules of flashinfer-python 0.6.14 (")
    assert "2 of 2: bfloat16-128 two took" in said[-1]
    assert library.built_variants() == {"bfloat16-128"}
    modules[1].jit_library_path.unlink()
    assert not library.is_built()


def test_build_of_a_second_variant_keeps_the_first(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = FakeModule(installed, "one")
    monkeypatch.setattr(library, "modules_of", lambda variant, capability: {"fa2": module})

    for variant in VARIANTS[:2]:
        library.build(lambda line: None, [variant])

    assert library.built_variants() == {variant.name for variant in VARIANTS[:2]}


def test_corrupt_module_is_compiled_again(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = FakeModule(installed, "one")
    module.jit_library_path.write_text("half")

    build(monkeypatch, module)

    assert module.jit_library_path.read_text() == "whole"
    assert module.num_builds == 2


def test_modules_that_come_compiled_need_no_tools(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = FakeModule(installed, "one")
    module.is_aot = True
    module.jit_library_path.write_text("whole")
    monkeypatch.setattr(library, "_why_not_tools", lambda: "there is no ninja in PATH")

    line, said = build(monkeypatch, module)

    assert line.startswith("1 modules of")
    assert (said, module.num_builds) == ([], 0)
    assert library.is_built()


def test_failed_build_says_the_compilers_first_error(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = "[1/2] nvcc -c a.cu\nFAILED: a.o\na.cu:7: error: no such type\na.cu:9: error: more"

    with pytest.raises(BuildError, match=r"of one failed: a\.cu:7: error: no such type\. `ninja"):
        build(monkeypatch, FakeModule(installed, "one", error=output))

    assert not library.is_built()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"bfloat16-64": ["/not/there.so"]}'])
def test_unusable_record_is_as_none(installed: Path, text: str) -> None:
    record = library._record()
    assert record is not None
    record.parent.mkdir()
    record.write_text(text)

    assert not library.is_built()


def test_record_is_of_one_version_and_one_kind_of_gpu(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(monkeypatch, FakeModule(installed, "one"))
    assert library.is_built()

    monkeypatch.setattr(library, "version_here", lambda: "0.6.15")
    assert not library.is_built()
    monkeypatch.setattr(library, "version_here", lambda: "0.6.14")
    monkeypatch.setattr(library, "capability_here", lambda: (8, 0))
    assert not library.is_built()


UNUSABLE = {
    "flashinfer-python is not installed; `pip install": ("version_here", None),
    "flashinfer-python 0.5.3 is installed, and versions from 0.6.14": ("version_here", "0.5.3"),
    "flashinfer-python 0.7.2.post1 is installed": ("version_here", "0.7.2.post1"),
    "there is no NVIDIA GPU here": ("capability_here", None),
    "compute capability 7.5; the kernels need 8.0": ("capability_here", (7, 5)),
}


@pytest.mark.parametrize("words", UNUSABLE)
def test_unusable_flashinfer_says_why(
    installed: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    name, value = UNUSABLE[words]
    monkeypatch.setattr(library, name, lambda: value)

    assert words in str(library.why_unusable())
    with pytest.raises(BuildError) as caught:
        library.build(lambda line: None)
    assert words in str(caught.value)


def test_tools_are_needed_until_it_is_built(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_why_not_tools", lambda: "there is no ninja in PATH")
    assert library.why_unusable() == "it is not built, and there is no ninja in PATH"
    with pytest.raises(BuildError, match="there is no ninja in PATH"):
        build(monkeypatch, FakeModule(installed, "one"))

    monkeypatch.setattr(library, "_why_not_tools", lambda: None)
    build(monkeypatch, FakeModule(installed, "one"))
    monkeypatch.setattr(library, "_why_not_tools", lambda: "there is no ninja in PATH")
    assert library.why_unusable() is None


def test_missing_ninja_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    assert "there is no ninja in PATH; `pip install ninja`" in str(library._why_not_tools())


def test_only_hopper_gets_fa3_and_only_for_plain_attention() -> None:
    plain = Variant(dtype="bfloat16", head_dim=128)

    assert plain.kernels((9, 0)) == ("fa2", "fa3")
    assert plain.kernels((8, 0)) == plain.kernels((10, 0)) == ("fa2",)
    assert attrs.evolve(plain, window=True).kernels((9, 0)) == ("fa2",)
