"""`quire build` compiles what it is told to, says what is there now, and what went wrong."""

from __future__ import annotations

import pytest
from fake_builder import FakeBuild
from fake_distributions import Installed, attention, model, returning

from quire.cli.main import main
from quire.errors import BuildError


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> FakeBuild:
    """Install two backends with something to build, one without, and a model."""
    fast, wide = FakeBuild(monkeypatch, "fast"), FakeBuild(monkeypatch, "wide")
    backends = [fast.descriptor(), wide.descriptor(), attention("plain")]
    installed = Installed(monkeypatch)
    installed.plugin("backends", "alpha", quire_attention_backends=returning(backends))
    installed.plugin("models", "beta", quire_models=returning([model("llama", "Llama")]))
    return fast


def test_build_reports_on_stderr_and_what_is_there_on_stdout(
    fast: FakeBuild, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", "fast"]) == 0

    assert capsys.readouterr() == ("fast: it is there\n", "fast: half of it\n")


def test_build_all_builds_everything(fast: FakeBuild, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--all"]) == 0

    assert capsys.readouterr().out == "fast: it is there\nwide: it is there\n"


@pytest.mark.parametrize("name", ["plain", "llama"])
def test_build_of_a_plugin_without_code_says_that_nothing_needs_building(
    fast: FakeBuild, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["build", name]) == 0

    assert capsys.readouterr().out == f"{name}: nothing needs building\n"


def test_build_of_an_unknown_name_lists_what_can_be_built(
    fast: FakeBuild, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", "fats", "fast"]) == 2

    assert capsys.readouterr().err == (
        "quire: error: unknown plugin 'fats'. Did you mean 'fast'? "
        "What can be built: fast, wide. `quire plugins` lists all.\n"
    )
    assert fast.calls == 0


@pytest.mark.parametrize("arguments", [[], ["--all", "fast"]])
def test_build_wants_names_or_all(
    fast: FakeBuild, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(["build", *arguments]) == 2

    assert "name what to build, or give --all. What can be built: fast, wide." in (
        capsys.readouterr().err
    )


def test_build_that_fails_shows_the_compilers_first_error(
    fast: FakeBuild, capsys: pytest.CaptureFixture[str]
) -> None:
    fast.error = BuildError("nvcc failed: a.cu(3): error: identifier is undefined")

    assert main(["build", "fast"]) == 1

    assert capsys.readouterr().err.splitlines()[-1] == (
        "quire: error: attention 'fast' cannot be built: "
        "nvcc failed: a.cu(3): error: identifier is undefined"
    )


def test_build_that_fails_keeps_no_other_from_being_built(
    fast: FakeBuild, capsys: pytest.CaptureFixture[str]
) -> None:
    fast.error = BuildError("there is no CUDA compiler.")

    assert main(["build", "--all"]) == 1

    told = capsys.readouterr()
    assert told.out == "wide: it is there\n"
    assert "attention 'fast' cannot be built: there is no CUDA compiler." in told.err
    assert told.err.splitlines()[-1] == ("quire: error: 1 of 2 plugins were not built; see above.")
