"""A shared library made of sources: its name in the cache, its build, its checksum.

    <cache>/<name>-<recipe>-<compiler>.so        the library
    <cache>/<name>-<recipe>-<compiler>.sha256    its checksum: what does not match is built again
    <cache>/<name>-<recipe>-<compiler>.failed    why the last build failed, and the whole output
    <cache>/<name>-<recipe>-<compiler>.lock      held by the process that builds

`recipe` hashes all source bytes, flags and the machine, `compiler` its path and version. Where the
compiler has gone, a library of the same recipe still serves.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from attrs import field, frozen

from quire.errors import BuildError
from quire_kernels.native.compilers import CXX, Compiler, run_compiler

CACHE_VARIABLE = "QUIRE_CACHE_DIR"


def cache_folder() -> Path:
    """Return where libraries are kept: below QUIRE_CACHE_DIR, XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own) / "native"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quire" / "native"


@frozen(kw_only=True)
class Source:
    """One translation unit and the flags of its own."""

    path: Path
    flags: tuple[str, ...] = ()


@frozen(kw_only=True)
class NativeLibrary:
    """A library of plain C functions for ctypes.

    `sources` are compiled one by one, side by side, with `flags` and their own, and linked with
    `link_flags`. `headers` are what they include of ours. `architecture` is what the flags say of
    the target, for the cache; the machine's own by default.
    """

    name: str
    sources: tuple[Source, ...]
    headers: tuple[Path, ...] = ()
    compiler: Compiler = CXX
    flags: tuple[str, ...] = ("-O3",)
    link_flags: tuple[str, ...] = ()
    architecture: str = field(factory=platform.machine)

    def is_built(self) -> bool:
        """Answer whether a whole library of these very sources is there."""
        return self.find() is not None

    def find(self) -> Path | None:
        """Return the library, None where it is not there or not whole."""
        exact = self._place()
        if exact is not None:
            return exact if _is_whole(exact) else None
        with contextlib.suppress(OSError):
            others = sorted(cache_folder().glob(f"{self.name}-{self._recipe()}-*.so"))
            return next((path for path in others if _is_whole(path)), None)
        return None

    def why_unusable(self) -> str | None:
        """Return None if it is built or can be, else why not: no compiler, or the last failure."""
        if self.is_built():
            return None
        place = self._place()
        if place is None:
            return f"it is not built, and {self.compiler.why_missing()}"
        with contextlib.suppress(OSError):
            failure = place.with_suffix(".failed").read_text().splitlines()
            if failure:
                return f"its last build failed: {failure[0]}; `quire build` tries again"
        return None

    def build(self, progress: Callable[[str], None]) -> Path:
        """Compile unless it is there, and return the library.

        Of several processes that build at once one compiles and the others wait for it.
        Raises: BuildError with the compiler's first error, or what is missing or not writable.
        """
        found = self.find()
        if found is not None:
            return found
        self.compiler.require()
        place = self._place()
        assert place is not None, self.name
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with _locked(place.with_suffix(".lock"), progress):
                if not _is_whole(place):
                    self._build(place, progress)
        except OSError as error:
            raise BuildError(
                f"cannot write into {place.parent}: {error.strerror or error}. "
                f"Name a folder that can be written in {CACHE_VARIABLE}."
            ) from error
        return place

    def load(self, progress: Callable[[str], None] = lambda _: None) -> ctypes.CDLL:
        """Return the library, built first where it has to be. Raises: BuildError."""
        path = self.build(progress)
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(f"cannot load {path}: {error}. Remove it and build again.") from error

    def describe(self, seconds: float) -> str:
        """Return what `quire build` prints once it is there."""
        path = self.find()
        size = path.stat().st_size / 1024 if path is not None else 0
        return f"{path} ({size:.0f} KiB, {seconds:.1f} s)"

    def _build(self, place: Path, progress: Callable[[str], None]) -> None:
        for left in place.parent.glob(f"{place.stem}.*.tmp"):  # of a build that was killed
            shutil.rmtree(left, ignore_errors=True)
        begin = time.perf_counter()
        folder = Path(tempfile.mkdtemp(prefix=f"{place.stem}.", suffix=".tmp", dir=place.parent))
        try:
            made = self._compile(folder, progress)
        except BuildError as error:
            log = place.with_suffix(".failed")
            _write(log, "\n".join([str(error), *getattr(error, "__notes__", [])]))
            raise BuildError(
                f"{error}. All that it said is in {log}. "
                f"{self.compiler.variable} names another compiler."
            ) from error
        else:
            _sync(made)
            os.replace(made, place)
            _write(place.with_suffix(".sha256"), _digest(place.read_bytes()))
            place.with_suffix(".failed").unlink(missing_ok=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        progress(f"compiled in {time.perf_counter() - begin:.1f} s")

    def _compile(self, folder: Path, progress: Callable[[str], None]) -> Path:
        """Compile and link into a folder and return the library. Raises: BuildError."""
        command = self.compiler.require()
        general = (*command, *self.compiler.flags, *self.flags)
        objects = [folder / f"{number}.o" for number in range(len(self.sources))]

        def compile_one(number: int) -> None:
            source = self.sources[number]
            begin = time.perf_counter()
            place = ("-c", str(source.path), "-o", str(objects[number]))
            run_compiler((*general, *source.flags, *place))
            progress(f"{source.path.name} took {time.perf_counter() - begin:.1f} s")

        progress(f"compiling {len(self.sources)} files with {command[0]}")
        with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
            for _ in pool.map(compile_one, range(len(self.sources))):
                pass
        made = folder / "library.so"
        run_compiler((*general, "-shared", *map(str, objects), "-o", str(made), *self.link_flags))
        return made

    def _place(self) -> Path | None:
        """Return where the library belongs, None without the compiler, whose name is in it."""
        identity = self.compiler.identity()
        if identity is None:
            return None
        return cache_folder() / f"{self.name}-{self._recipe()}-{_digest(identity.encode())[:8]}.so"

    def _recipe(self) -> str:
        parts: list[bytes] = [
            self.architecture.encode(),
            repr((self.flags, self.link_flags)).encode(),
        ]
        for source in self.sources:
            parts += [repr(source.flags).encode()]
        for path in (*(source.path for source in self.sources), *self.headers):
            parts += [path.name.encode(), path.read_bytes()]
        return _digest(b"".join(len(part).to_bytes(8, "little") + part for part in parts))[:16]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _is_whole(library: Path) -> bool:
    try:
        return library.with_suffix(".sha256").read_text() == _digest(library.read_bytes())
    except OSError:
        return False


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_suffix(f"{path.suffix}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def _locked(path: Path, progress: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock that ends with the process that holds it."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("another process is building it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
