"""The door of the command line: exit codes, one line an error, nothing slow before it is needed."""

from __future__ import annotations

import argparse
import errno
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from quire.cli import main as door
from quire.errors import ConfigError, KernelError, PluginError, RequestError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Return a subcommand `try` whose `run` the test sets."""
    module = types.ModuleType("quire_test_command")
    module.add_arguments = lambda parser: parser.add_argument("--count", type=int)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(door.COMMANDS, "try", (module.__name__, "test the door"))
    return module


def run_that_raises(error: BaseException) -> Any:
    """Return a `run` that raises."""

    def run(arguments: argparse.Namespace) -> int:
        raise error

    return run


def quire(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "quire", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
        **{"stdout": subprocess.PIPE, **options},
    )


def test_main_returns_what_the_command_returns(command: types.ModuleType) -> None:
    command.run = lambda arguments: arguments.count  # type: ignore[attr-defined]

    assert door.main(["try", "--count", "7"]) == 7


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a\nb"), 2),
        (RequestError("a b"), 2),
        (PluginError("a b"), 2),
        (KernelError("a b"), 1),
    ],
)
def test_main_shows_an_error_as_one_line_with_its_exit_code(
    command: types.ModuleType, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    command.run = run_that_raises(error)  # type: ignore[attr-defined]

    assert door.main(["try"]) == code

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "quire: error: a b\n"


def test_main_shows_the_traceback_when_asked(
    command: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run = run_that_raises(ConfigError("what is wrong"))  # type: ignore[attr-defined]

    assert door.main(["try", "--traceback"]) == 2

    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "quire: error: what is wrong"


def test_main_ends_with_130_when_interrupted(
    command: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run = run_that_raises(KeyboardInterrupt())  # type: ignore[attr-defined]

    assert door.main(["try"]) == 130
    assert capsys.readouterr().err == "quire: interrupted\n"


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), OSError(errno.EIO, "a bug"), AssertionError("a bug")]
)
def test_main_lets_a_bug_show_its_traceback(command: types.ModuleType, error: Exception) -> None:
    command.run = run_that_raises(error)  # type: ignore[attr-defined]

    with pytest.raises(type(error), match="a bug"):
        door.main(["try"])


@pytest.mark.parametrize(
    ("argv", "fact"),
    [
        (["plugin"], "unknown command 'plugin'. Did you mean 'plugins'? There are: "),
        (["plugins", "--jsno"], "unknown option '--jsno'. Did you mean '--json'? `quire plugins"),
        (["plugins", "--jso=1"], "unknown option '--jso'. Did you mean '--json'? `quire plugins"),
        (["plugins", "extra"], "argument ACTION: invalid choice: 'extra' (choose from "),
        (["plugins", "--kind"], "argument --kind: expected one argument. `quire plugins --help`"),
        (["plugins", "--kind", "atention"], "--kind is 'atention'; allowed: checkpoint, model, "),
        (["--versoin"], "unknown option '--versoin'. Did you mean '--version'? `quire --help`"),
        (["generate", "demo", "--block-sise", "8"], "unknown option '--block-sise'. Did you mean"),
    ],
)
def test_main_refuses_what_it_does_not_know_with_the_nearest_name(
    capsys: pytest.CaptureFixture[str], argv: list[str], fact: str
) -> None:
    assert door.main(argv) == 2

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"quire: error: {fact}")
    assert captured.err.count("\n") == 1


def test_main_without_a_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert door.main([]) == 2

    assert capsys.readouterr().out.startswith("usage: quire COMMAND")


def test_main_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    import quire as package

    assert door.main(["--version"]) == 0
    assert capsys.readouterr().out == f"quire {package.__version__}\n"


@pytest.mark.parametrize("name", door.COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert door.main([name, "--help"]) == 0

    assert capsys.readouterr().out.startswith(f"usage: quire {name}")


def test_main_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    door.main(["--help"])

    shown = capsys.readouterr().out
    assert [name for name in door.COMMANDS if f"\n  {name} " not in shown] == []


def test_python_m_quire_is_the_command() -> None:
    done = quire("--version")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("quire ")


def test_main_is_quiet_when_the_reader_goes_away() -> None:
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()

    done = quire("--version", stdout=reader.stdin)

    assert (done.returncode, done.stderr) == (door.BROKEN_PIPE, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_main_reports_a_full_disk_in_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = quire("--version", stdout=full)

    assert done.returncode == 1
    assert done.stderr.startswith("quire: error: cannot write: ")
    assert done.stderr.count("\n") == 1
