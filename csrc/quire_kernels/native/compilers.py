"""Which compiler there is, what it is, and what it said first when it failed."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from attrs import frozen

from quire.errors import BuildError

_ERROR = re.compile(r"\berror\b|undefined reference|cannot find -l|Error:", re.IGNORECASE)
_VERSION_SECONDS = 20


@frozen(kw_only=True)
class Compiler:
    """A kind of compiler: the variable that names it, its usual names and folders.

    `flags` make a position-independent object; `needs` is a further compiler that it calls.
    """

    title: str
    variable: str
    names: tuple[str, ...]
    remedy: str
    folders: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    needs: Compiler | None = None

    def command(self) -> tuple[str, ...] | None:
        """Return the command that compiles, None where there is none. Takes microseconds."""
        given = shlex.split(os.environ.get(self.variable, ""))
        candidates = [given] if given else [[name] for name in self.names]
        places = os.environ.get("PATH", os.defpath)
        for folder in self.folders:
            places += os.pathsep + os.path.expandvars(folder)
        for candidate in candidates:
            found = shutil.which(candidate[0], path=places)
            if found is not None:
                return (found, *candidate[1:])
        return None

    def why_missing(self) -> str | None:
        """Return None where it can be called, else what is missing and how to get it."""
        if self.command() is None:
            given = os.environ.get(self.variable)
            fact = (
                f"{self.variable} is {given!r}, which is not there"
                if given
                else (f"there is no {self.title} ({', '.join(self.names)})")
            )
            return f"{fact}; {self.remedy}, or name one in {self.variable}"
        return None if self.needs is None else self.needs.why_missing()

    def require(self) -> tuple[str, ...]:
        """Return the command. Raises: BuildError naming what is missing."""
        reason, command = self.why_missing(), self.command()
        if reason is not None or command is None:
            raise BuildError(f"{reason}.")
        return command

    def identity(self) -> str | None:
        """Return path and version, host compiler included; None where it is not there."""
        command = self.command()
        if command is None or self.why_missing() is not None:
            return None
        own = f"{shlex.join(command)}\n{_version(command)}"
        return own if self.needs is None else f"{own}\n{self.needs.identity()}"


CXX = Compiler(
    title="C++ compiler",
    variable="CXX",
    names=("g++", "clang++", "c++"),
    remedy="install g++ (`apt install g++`)",
    flags=("-fPIC",),
)
CUDA = Compiler(
    title="CUDA compiler",
    variable="CUDACXX",
    names=("nvcc",),
    remedy="install the CUDA toolkit",
    folders=("$CUDA_HOME/bin", "/usr/local/cuda/bin"),
    flags=("-Xcompiler", "-fPIC"),
    needs=CXX,
)


@functools.lru_cache
def _version(command: Sequence[str]) -> str:
    """Return what the compiler says of itself; asked once a process."""
    try:
        done = subprocess.run(
            [*command, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_VERSION_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    return done.stdout


def run_compiler(command: Sequence[str]) -> str:
    """Run one compilation and return its output.

    Raises: BuildError with its first error; its note has the command and all that was said.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise BuildError(f"cannot run {command[0]}: {error.strerror}.") from error
    if done.returncode != 0:
        name = Path(command[0]).name
        failure = BuildError(f"{name} failed: {first_error(done.stdout, done.returncode)}")
        failure.add_note(f"$ {shlex.join(command)}\n{done.stdout}")
        raise failure
    return done.stdout


def first_error(output: str, returncode: int) -> str:
    """Return the first line of a compiler's output that tells of an error, else how it ended."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    found = [line for line in lines if _ERROR.search(line)] or lines
    if returncode < 0 and not any(_ERROR.search(line) for line in lines):
        return f"it was killed by signal {-returncode} (out of memory?)"
    return found[0] if found else f"it said nothing and ended with code {returncode}"
