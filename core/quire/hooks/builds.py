"""Plugins whose code is compiled: build one by name, before its use, or beside a start."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable

from quire.config import nearest
from quire.errors import BuildError, ConfigError, QuireError
from quire.hooks.loading import first_line, refusal
from quire.hooks.registry import Registry
from quire.hooks.validation import Registered
from quire.interfaces.plugin import Selection

LOWEST_PRIORITY = 19
# How reasons begin that say nothing of a plugin that could serve.
COMES_AFTER, NEVER_PICKED = "it comes after", "auto never picks it"


def not_built(name: str) -> str:
    """Return what is said of a plugin that can serve once it is built."""
    return f"not built; run `quire build {name}`"


def buildable(registry: Registry) -> list[Registered]:
    """Return every plugin that has something to build."""
    return [entry for entry in registry.entries() if entry.descriptor.build is not None]


def named(registry: Registry, name: str) -> list[Registered]:
    """Return the plugins of a name, of any kind, that have something to build; maybe none.

    Raises: ConfigError for a name that no plugin has.
    """
    if all(entry.name != name for entry in registry.entries()):
        names = sorted({entry.name for entry in buildable(registry)})
        raise ConfigError(
            f"unknown plugin {name!r}.{nearest(name, names)} "
            f"What can be built: {', '.join(names) or 'nothing'}. `quire plugins` lists all."
        )
    return [entry for entry in buildable(registry) if entry.name == name]


def build(entry: Registered, progress: Callable[[str], None]) -> str:
    """Build a plugin, built or not, and return what is there now in one line.

    Raises: BuildError, or another QuireError of the plugin; PluginError where it breaks its
    contract.
    """
    function = entry.descriptor.load_build()
    assert function is not None, entry.name
    try:
        result = function(progress)
    except (KeyboardInterrupt, QuireError):
        raise
    except BaseException as error:
        raise refusal(
            entry.owner, f"fails in {entry.descriptor.build!r}: {first_line(error)}"
        ) from error
    if not isinstance(result, str):
        fact = f"returns {result!r} from {entry.descriptor.build!r} where one line is wanted"
        raise refusal(entry.owner, fact)
    if not entry.is_built():
        fact = f"says that {entry.name!r} is built, and is_built() says that it is not"
        raise refusal(entry.owner, fact)
    return result


def build_before_use(registry: Registry, kind: str, name: str) -> None:
    """Build a plugin that was asked for by name and is not built, with progress on stderr.

    Raises: BuildError with the compiler's first error.
    """
    entry = registry.entry(kind, name)
    if entry.is_built():
        return

    def say(line: str) -> None:
        print(f"quire: {name}: {line}", file=sys.stderr, flush=True)

    say("not built yet; building it now, once")
    try:
        say(build(entry, say))
    except BuildError as error:
        raise BuildError(f"{kind} {name!r} cannot be built: {error}") from error


def tell_what_is_missing(registry: Registry, choice: Selection, building: Iterable[str]) -> None:
    """Say on stderr what `auto` would rather have used, were it compiled, and why it is not.

    `building` are those that are being built for the next start.
    """
    for name, reason in choice.passed_over:
        if reason.startswith(COMES_AFTER) or reason.startswith(NEVER_PICKED):
            continue
        if registry.entry(choice.kind, name).descriptor.build is None:
            continue
        later = " It is being built for the next start." if name in building else ""
        print(
            f"quire: {choice.kind} {choice.used!r} is used, not {name!r}: {reason}{later}",
            file=sys.stderr,
            flush=True,
        )


def build_in_background(registry: Registry, kind: str, unbuilt: Iterable[str]) -> list[str]:
    """Begin to build those of the unbuilt plugins that allow it; return their names, at once.

    Each build is a process of its own at the lowest priority, which outlives this one.
    """
    wanted = [
        name for name in unbuilt if registry.entry(kind, name).descriptor.builds_in_background
    ]
    for name in wanted:
        threading.Thread(target=_build_apart, args=(name,), daemon=True).start()
    return wanted


def _build_apart(name: str) -> None:
    """Run `quire build NAME` and wait for it, so that no dead child is left."""
    child = subprocess.Popen(
        [sys.executable, "-m", "quire", "build", name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.setpriority(os.PRIO_PROCESS, child.pid, LOWEST_PRIORITY)
    child.wait()
