"""Find the plugins of the entry-point group `quire`, import them and check their API version.

Whatever goes wrong stops the start with one PluginError that names plugin, distribution, remedy.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from attrs import frozen

from quire.config import nearest
from quire.errors import ConfigError, PluginError
from quire.interfaces.plugin import API_VERSION
from quire.patience import telling

GROUP = "quire"


@frozen(kw_only=True)
class Owner:
    """Who brought a plugin: its entry-point name and the distribution it came with."""

    plugin: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"plugin {self.plugin!r} of {self.distribution} {self.version}"


@frozen(kw_only=True)
class LoadedPlugin:
    """A plugin's module (or other object), imported, of an API version that fits."""

    owner: Owner
    module: Any
    api_version: tuple[int, int]


def import_plugins(disabled: Collection[str] = ()) -> list[LoadedPlugin]:
    """Import all installed plugins but the disabled ones, in the order of their names.

    Raises: PluginError for the first that cannot be used; ConfigError for an unknown name among
    the disabled ones.
    """
    found = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    _check_disabled(disabled, [entry.name for entry in found])
    wanted = [entry for entry in found if entry.name not in disabled]
    _check_unique(wanted)
    found_plugins = []
    with telling() as wait:
        for entry in wanted:
            wait.words = f"the import of {_owner(entry)}"
            found_plugins.append(_import(entry))
    return found_plugins


def first_line(error: BaseException) -> str:
    """Return an exception as one short line."""
    text = " ".join(str(error).split())
    text = text.rstrip(".") if len(text) <= 300 else text[:297] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def refusal(owner: Owner, fact: str, remedy: str = "") -> PluginError:
    """Return the error that says what is wrong with a plugin and what to do about it."""
    remedy = remedy or f"Reinstall or upgrade {owner.distribution}"
    return PluginError(
        f"{owner} {fact}. {remedy}, or start without it: --disable-plugin {owner.plugin}."
    )


def _owner(entry: EntryPoint) -> Owner:
    if entry.dist is None:
        return Owner(plugin=entry.name, distribution="an unknown distribution", version="")
    return Owner(plugin=entry.name, distribution=entry.dist.name, version=str(entry.dist.version))


def _check_disabled(disabled: Collection[str], installed: list[str]) -> None:
    for name in disabled:
        if name not in installed:
            raise ConfigError(
                f"--disable-plugin {name}: no such plugin is installed.{nearest(name, installed)} "
                f"Installed: {', '.join(installed) or 'none'}."
            )


def _check_unique(entries: list[EntryPoint]) -> None:
    owners: dict[str, Owner] = {}
    for entry in entries:
        owner = _owner(entry)
        first = owners.setdefault(entry.name, owner)
        if first is not owner:
            raise PluginError(
                f"two plugins are named {entry.name!r}: one of {first.distribution} "
                f"{first.version} and one of {owner.distribution} {owner.version}. "
                f"Uninstall one of them, or start without both: --disable-plugin {entry.name}."
            )


def _import(entry: EntryPoint) -> LoadedPlugin:
    owner = _owner(entry)
    try:
        module = entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin may also call sys.exit while it is imported
        raise refusal(owner, f"cannot be imported: {first_line(error)}") from error
    return LoadedPlugin(owner=owner, module=module, api_version=_api_version(owner, module))


def _api_version(owner: Owner, module: Any) -> tuple[int, int]:
    declared = getattr(module, "QUIRE_API_VERSION", None)
    ours = f"this is API {API_VERSION[0]}.{API_VERSION[1]}"
    if declared is None:
        raise refusal(
            owner,
            f"does not say for which version of Quire's API it was written; {ours}",
            f"Its author should add QUIRE_API_VERSION = {API_VERSION} to {entry_module(module)}",
        )
    if not _is_version(declared):
        raise refusal(
            owner,
            f"has QUIRE_API_VERSION = {_short(declared)}, which is not a pair of whole numbers",
            f"Its author should write it as QUIRE_API_VERSION = {API_VERSION}",
        )
    major, minor = declared
    if (major, minor) > API_VERSION:
        raise refusal(
            owner,
            f"was written for API {major}.{minor} of Quire; {ours}",
            f"Upgrade quire, or install an older {owner.distribution}",
        )
    if major < API_VERSION[0]:
        raise refusal(
            owner,
            f"was written for API {major}.{minor} of Quire; {ours}",
            f"Upgrade {owner.distribution}, or install an older quire",
        )
    return major, minor


def entry_module(module: Any) -> str:
    """Return how a plugin's module is called, for messages."""
    return getattr(module, "__name__", None) or type(module).__name__


def _is_version(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)
    )


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
