"""Which of the library's kernels are compiled, ahead of use, and whether they are. No torch.

The library compiles a module a variant and keeps it in its own cache. Beside our own caches a
record says which modules were built, for one version of the library and one kind of GPU:

    <cache>/flashinfer-<version>-sm_<capability>.json      {variant: [paths of its modules]}
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from attrs import frozen

from quire.errors import BuildError
from quire_kernels.native import CUDA, cache_folder, capability_here, first_error

DISTRIBUTION = "flashinfer-python"
LEAST_VERSION, NEXT_VERSION = (0, 6, 14), (0, 7)
LEAST_CAPABILITY = (8, 0)
# Its FA3 kernels exist for no other GPU, older or newer.
HOPPER = (9, 0)
# Files of a module, which the library's ninja compiles side by side.
FILES_A_MODULE = 10

REMEDY = "`pip install 'quire[flashinfer]'` brings it"


@frozen(kw_only=True)
class Variant:
    """What a compiled module is for; other things are arguments of a launch."""

    dtype: str
    head_dim: int
    window: bool = False
    softcap: bool = False

    @property
    def name(self) -> str:
        """Return its name in the record and in messages."""
        words = [self.dtype, str(self.head_dim)]
        return "-".join(words + ["window"] * self.window + ["softcap"] * self.softcap)

    def kernels(self, capability: tuple[int, int]) -> tuple[str, ...]:
        """Return the library's names of the kernels that are built for it.

        FA2 serves decodes everywhere, and prompts where there is no FA3 kernel.
        """
        has_fa3 = capability == HOPPER and not (self.window or self.softcap)
        return ("fa2", "fa3") if has_fa3 else ("fa2",)


# What the models that Quire knows, or will, ask for. A module takes minutes of a core.
VARIANTS = (
    Variant(dtype="bfloat16", head_dim=128),
    Variant(dtype="bfloat16", head_dim=64),
    Variant(dtype="bfloat16", head_dim=256),
    Variant(dtype="float16", head_dim=128),
    Variant(dtype="float16", head_dim=64),
    Variant(dtype="bfloat16", head_dim=128, window=True),
    Variant(dtype="bfloat16", head_dim=64, window=True),
    Variant(dtype="bfloat16", head_dim=256, window=True),
    Variant(dtype="bfloat16", head_dim=256, softcap=True),
    Variant(dtype="bfloat16", head_dim=256, window=True, softcap=True),
)


def version_here() -> str | None:
    """Return the version of the library that is installed, without importing it."""
    if find_spec("flashinfer") is None:
        return None
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None


def _why_not_version() -> str | None:
    version = version_here()
    if version is None:
        return f"the package {DISTRIBUTION} is not installed; {REMEDY}"
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    if not LEAST_VERSION <= numbers < NEXT_VERSION:
        least, following = (".".join(map(str, x)) for x in (LEAST_VERSION, NEXT_VERSION))
        return (
            f"{DISTRIBUTION} {version} is installed, and versions from {least} on and before "
            f"{following} are known; {REMEDY}"
        )
    return None


def _why_not_gpu() -> str | None:
    capability = capability_here()
    if capability is None:
        return "there is no NVIDIA GPU here, or no driver for it"
    if capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, x)) for x in (capability, LEAST_CAPABILITY))
        return f"the GPU has compute capability {found}; the kernels need {least}"
    return None


def _why_not_tools() -> str | None:
    if shutil.which("ninja") is None:
        return "there is no ninja in PATH; `pip install ninja` or `apt install ninja-build`"
    return CUDA.why_missing()


def why_unusable() -> str | None:
    """Return None where the library can serve, or can be built; else why not."""
    reason = _why_not_version() or _why_not_gpu()
    if reason is not None or is_built():
        return reason
    missing = _why_not_tools()
    return None if missing is None else f"it is not built, and {missing}"


def _record() -> Path | None:
    version, capability = version_here(), capability_here()
    if version is None or capability is None:
        return None
    name = f"flashinfer-{version}-sm_{capability[0]}{capability[1]}.json"
    return cache_folder() / name


def built_variants() -> frozenset[str]:
    """Return the names of the variants whose modules are all there."""
    return frozenset(
        name for name, paths in _recorded().items() if all(Path(path).exists() for path in paths)
    )


def _recorded() -> Mapping[str, list[str]]:
    place = _record()
    if place is None:
        return {}
    try:
        found = json.loads(place.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_built() -> bool:
    """Answer whether modules of this library for this GPU are there."""
    return bool(built_variants())


def build(progress: Callable[[str], None], variants: Iterable[Variant] = VARIANTS) -> str:
    """Compile what is not there yet, and note what is. Raises: BuildError."""
    reason = _why_not_version() or _why_not_gpu()
    capability = capability_here()
    if reason is not None or capability is None:
        raise BuildError(f"{reason}.")
    begin = time.perf_counter()
    modules = {variant.name: modules_of(variant, capability) for variant in variants}
    named = {
        f"{name} {kernel}": module
        for name, of_one in modules.items()
        for kernel, module in of_one.items()
    }
    # Some packages bring modules that are compiled already.
    needed = {name: module for name, module in named.items() if not module.is_aot}
    missing = _why_not_tools() if needed else None
    if missing is not None:
        raise BuildError(f"{missing}.")
    _compile(needed, progress)
    _note(
        {
            name: [str(module.get_library_path()) for module in of_one.values()]
            for name, of_one in modules.items()
        }
    )
    seconds = time.perf_counter() - begin
    return f"{len(named)} modules of {DISTRIBUTION} {version_here()} ({seconds:.0f} s)"


def modules_of(variant: Variant, capability: tuple[int, int]) -> dict[str, Any]:
    """Return what the library would compile for a variant, as its own objects, by kernel."""
    return {kernel: _module(kernel, variant) for kernel in variant.kernels(capability)}


def module_arguments(variant: Variant) -> tuple[Any, ...]:
    """Return the arguments that name a module of batches over pages, behind its kernel's name."""
    import torch

    dtype = getattr(torch, variant.dtype)
    # Query, keys and values, output, indices; sizes of keys and values; no encoding of positions.
    kinds = (dtype, dtype, dtype, torch.int32, variant.head_dim, variant.head_dim, 0)
    return (*kinds, variant.window, variant.softcap, False)


def _module(kernel: str, variant: Variant) -> Any:
    from flashinfer.jit.attention.modules import gen_batch_prefill_module

    return gen_batch_prefill_module(kernel, *module_arguments(variant))


def _compile(modules: Mapping[str, Any], progress: Callable[[str], None]) -> None:
    """Compile as many at once as there are cores for. Raises: BuildError."""
    done = itertools.count(1)

    def compile_one(name: str) -> None:
        begin = time.perf_counter()
        _build_whole(modules[name])
        seconds = time.perf_counter() - begin
        progress(f"{next(done)} of {len(modules)}: {name} took {seconds:.0f} s")

    if modules:
        progress(f"compiling {len(modules)} modules, each of which takes a minute or more")
    workers = max(1, len(os.sched_getaffinity(0)) // FILES_A_MODULE)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for _ in pool.map(compile_one, modules):
            pass


def _build_whole(module: Any) -> None:
    """Compile one module, again where what is there cannot be loaded. Raises: BuildError."""
    place = module.jit_library_path
    try:
        module.build(verbose=False)
        if not _can_load(module, place):
            place.unlink()
            module.build(verbose=False)
            module.load(place)
    except (OSError, RuntimeError) as error:
        said = str(error)
        raise BuildError(
            f"flashinfer's build of {module.name} failed: {first_error(said, 1)}. "
            f"`ninja -C {module.build_dir}` says all of it."
        ) from error


def _can_load(module: Any, place: Path) -> bool:
    try:
        module.load(place)
    except (OSError, RuntimeError):
        return False
    return True


def _note(built: Mapping[str, list[str]]) -> None:
    """Add to the record what is there now."""
    place = _record()
    assert place is not None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({**_recorded(), **built}, indent=1))
        os.replace(temporary, place)
    except OSError as error:
        raise BuildError(
            f"cannot write {place}: {error.strerror or error}. "
            f"Name a folder that can be written in QUIRE_CACHE_DIR."
        ) from error
