"""The door of the command line: find the subcommand, run it, turn errors into one line."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn, Protocol

from quire.config import nearest
from quire.errors import ConfigError, QuireError

INTERRUPTED = 130
BROKEN_PIPE = 141

COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("quire.cli.generate", "complete prompts and print the results"),
    "chat": ("quire.cli.chat", "talk with a model in the terminal"),
    "serve": ("quire.cli.serve", "serve a model to OpenAI clients"),
    "bench": ("quire.cli.bench", "measure a server or an engine"),
    "quantize": ("quire.cli.quantize", "write a quantized checkpoint"),
    "build": ("quire.cli.build", "compile plugins' native code ahead of their use"),
    "explain": ("quire.cli.explain", "print every setting, choice and byte of a start"),
    "plugins": ("quire.cli.plugins", "list the installed plugins and whether they work here"),
}
"""Name of a subcommand -> (module, help). The module has the two functions of `Command`."""


class Command(Protocol):
    """What the module of a subcommand offers. It imports torch only inside `run`, if at all."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do the work and return the exit code. Raises: QuireError, shown as one line."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ConfigErrors, with the nearest right name."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and ending the process."""
        stop = "" if message.endswith("?") else "."
        raise ConfigError(f"{message}{stop} `{self.prog} --help` shows what there is.")

    def parse_all(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse, and refuse what is left over. Raises: ConfigError."""
        arguments, unknown = self.parse_known_args(argv)
        for text in unknown:
            name = text.partition("=")[0]
            if name.startswith("-"):
                options = [o for p in (self, *_below(self)) for o in p._option_string_actions]
                hint = nearest(name, options)
                self.error(f"unknown option {name!r}" + (f".{hint}" if hint else ""))
            self.error(f"unexpected argument {text!r}")
        return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run `quire` and return its exit code.

    0: done; 1: it failed; 2: what was asked for cannot be done; 130: interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if sys.stdout is None:
            raise ConfigError("standard output is closed; there is nowhere to print to.")
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = _run_to_the_end(argv)
        sys.stdout.flush()
    except QuireError as error:
        return _report(error, argv)
    except KeyboardInterrupt:
        print("quire: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return BROKEN_PIPE
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _drop_output()
        return _report(QuireError(f"cannot write: {error}. Free some space and try again."), argv)
    return code


def _run_to_the_end(argv: Sequence[str]) -> int:
    try:
        return _run(argv)
    except SystemExit as end:  # argparse leaves by it after `--help`
        return end.code if isinstance(end.code, int) else 0


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0].startswith("-"):
        return _run_alone(argv)
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        raise ConfigError(
            f"unknown command {name!r}.{nearest(name, COMMANDS)} "
            f"There are: {', '.join(COMMANDS)}. `quire --help` explains them."
        )
    module_name, summary = COMMANDS[name]
    command: Command = importlib.import_module(module_name)
    parser = Parser(prog=f"quire {name}", description=_as_title(summary), allow_abbrev=False)
    command.add_arguments(parser)
    _add_traceback(parser)
    return command.run(parser.parse_all(rest))


def _run_alone(argv: Sequence[str]) -> int:
    """Handle `quire` without a subcommand: help and version."""
    parser = Parser(
        prog="quire",
        usage="quire COMMAND ...",
        description="An LLM inference engine whose every hot part is a plugin.",
        epilog=_command_list(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    _add_traceback(parser)
    if parser.parse_all(argv).version:
        from quire import __version__

        print(f"quire {__version__}")
        return 0
    parser.print_help()
    return 0 if argv else 2


def _command_list() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["commands:", *lines, "", "`quire COMMAND --help` explains one."])


def _as_title(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _add_traceback(parser: argparse.ArgumentParser) -> None:
    for one in (parser, *_below(parser)):
        one.add_argument(
            "--traceback", action="store_true", help="show where an error came from, not only what"
        )


def _below(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Return the parsers of a subcommand's own subcommands."""
    actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [one for action in actions for one in action.choices.values()]


def _report(error: QuireError, argv: Sequence[str]) -> int:
    if "--traceback" in argv:
        traceback.print_exception(error)
    print(f"quire: error: {_one_line(error)}", file=sys.stderr)
    return error.exit_code


def _one_line(message: object) -> str:
    """Return a message on one line; a checkpoint's words must not steer the terminal."""
    words = " ".join(str(message).split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)


def _show_warning(message: Warning | str, *_details: object, **_options: object) -> None:
    print(f"quire: warning: {_one_line(message)}", file=sys.stderr)


def _drop_output() -> None:
    """Point standard output at nothing, so that the interpreter's last flush cannot fail."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)
