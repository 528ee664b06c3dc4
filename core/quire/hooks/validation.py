"""Check what a plugin implements and what its hooks return; the core trusts it from then on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pluggy
from attrs import frozen

from quire.config import nearest
from quire.errors import PluginError
from quire.hooks import hookspecs
from quire.hooks.kinds import KINDS, Kind
from quire.hooks.loading import LoadedPlugin, Owner, first_line, refusal
from quire.interfaces.plugin import Descriptor
from quire.patience import telling

HOOKS = tuple(kind.hook for kind in KINDS.values())


@frozen(kw_only=True)
class Registered:
    """One descriptor, who brought it, and whether it works on this machine.

    `unusable` is None, or the reason in a sentence.
    """

    kind: str
    descriptor: Descriptor
    owner: Owner
    api_version: tuple[int, int]
    unusable: str | None

    @property
    def name(self) -> str:
        """The descriptor's name."""
        return self.descriptor.name

    def is_built(self) -> bool:
        """Answer whether there is nothing left to compile: asked anew, since builds end.

        Raises: PluginError where the plugin cannot tell.
        """
        try:
            found = self.descriptor.is_built()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            fact = f"fails in is_built() of {self.name!r}: {first_line(error)}"
            raise refusal(self.owner, fact) from error
        if not isinstance(found, bool):
            fact = f"returns {found!r} from is_built() of {self.name!r} where a bool is wanted"
            raise refusal(self.owner, fact)
        return found


def collect(plugins: list[LoadedPlugin]) -> list[Registered]:
    """Return everything that the plugins offer, ordered by kind, then by name.

    Raises: PluginError for an unknown hook, a wrong argument, a hook that raises or returns
    anything but a list of its descriptor, and for a name that is taken twice.
    """
    manager = pluggy.PluginManager("quire")
    manager.add_hookspecs(hookspecs)
    for plugin in plugins:
        _register(manager, plugin)
    by_name = {plugin.owner.plugin: plugin for plugin in plugins}
    found: list[Registered] = []
    for kind in KINDS.values():
        implementations = getattr(manager.hook, kind.hook).get_hookimpls()
        offers = [
            offer
            for implementation in implementations
            for offer in _call(kind, by_name[implementation.plugin_name], implementation.function)
        ]
        _check_unique(kind, offers)
        found += sorted(offers, key=lambda offer: offer.name)
    return found


def _register(manager: pluggy.PluginManager, plugin: LoadedPlugin) -> None:
    """Give a plugin to pluggy, after a check of its hooks' names."""
    hooks = _implemented(manager, plugin)
    if not hooks:
        raise refusal(
            plugin.owner, f"implements none of Quire's hooks, which are {', '.join(HOOKS)}"
        )
    try:
        manager.register(plugin.module, name=plugin.owner.plugin)
    except pluggy.PluginValidationError as error:
        raise refusal(plugin.owner, _wrong_argument(hooks) or first_line(error)) from error
    except ValueError as error:
        twin = manager.get_name(plugin.module)
        fact = f"names the same module as plugin {twin!r}" if twin else first_line(error)
        raise refusal(plugin.owner, fact) from error


def _implemented(
    manager: pluggy.PluginManager, plugin: LoadedPlugin
) -> dict[str, Callable[..., Any]]:
    """Return the functions of a plugin that are hooks. Raises: PluginError for a wrong one."""
    hooks = {}
    for attribute in dir(plugin.module):
        options = manager.parse_hookimpl_opts(plugin.module, attribute)
        if options is None:
            _check_marked(plugin, attribute)
            continue
        name = options.get("specname") or attribute
        if name not in HOOKS:
            raise refusal(
                plugin.owner,
                f"implements a hook {name!r} that does not exist.{nearest(name, HOOKS)} "
                f"There are {', '.join(HOOKS)}",
            )
        if options.get("wrapper") or options.get("hookwrapper"):
            raise refusal(plugin.owner, f"wraps the hook {name!r}; no hook of Quire can be wrapped")
        hooks[name] = getattr(plugin.module, attribute)
    return hooks


def _check_marked(plugin: LoadedPlugin, attribute: str) -> None:
    """Find the hook whose author forgot the marker; it would be ignored."""
    if attribute in HOOKS and inspect.isroutine(getattr(plugin.module, attribute)):
        raise refusal(
            plugin.owner, f"has a function {attribute!r} without @quire.hookimpl above it"
        )


def _wrong_argument(hooks: dict[str, Callable[..., Any]]) -> str:
    for name, function in hooks.items():
        arguments = inspect.signature(function).parameters
        if arguments:
            return f"takes {', '.join(map(repr, arguments))} in {name!r}; the hook has no argument"
    return ""


def _call(kind: Kind, plugin: LoadedPlugin, function: Callable[[], Any]) -> list[Registered]:
    try:
        with telling(f"{kind.hook!r} of {plugin.owner}"):
            offered = function()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise refusal(plugin.owner, f"fails in {kind.hook!r}: {first_line(error)}") from error
    wanted = kind.descriptor.__name__
    if not isinstance(offered, (list, tuple)):
        raise refusal(
            plugin.owner,
            f"returns {_type_of(offered)} from {kind.hook!r} where a list of {wanted} is wanted",
        )
    for position, descriptor in enumerate(offered):
        if not isinstance(descriptor, kind.descriptor):
            raise refusal(
                plugin.owner,
                f"returns {_type_of(descriptor)} from {kind.hook!r} as element {position}, "
                f"where {wanted} is wanted",
            )
    return [
        Registered(
            kind=kind.name,
            descriptor=descriptor,
            owner=plugin.owner,
            api_version=plugin.api_version,
            unusable=_why_unusable(plugin.owner, descriptor),
        )
        for descriptor in offered
    ]


def _type_of(value: object) -> str:
    return "None" if value is None else f"an object of type {type(value).__name__}"


def _why_unusable(owner: Owner, descriptor: Descriptor) -> str | None:
    try:
        with telling(f"why_unusable() of {descriptor.name!r}, {owner}"):
            reason = descriptor.why_unusable()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise refusal(
            owner, f"fails in why_unusable() of {descriptor.name!r}: {first_line(error)}"
        ) from error
    if reason is not None and not (isinstance(reason, str) and reason):
        raise refusal(
            owner,
            f"returns {reason!r} from why_unusable() of {descriptor.name!r} "
            f"where None or a sentence is wanted",
        )
    return reason


def _check_unique(kind: Kind, offers: list[Registered]) -> None:
    owners: dict[str, Registered] = {}
    for offer in offers:
        first = owners.setdefault(offer.name, offer)
        if first is not offer:
            raise PluginError(
                f"two plugins bring {kind.title} {offer.name!r}: {first.owner} and {offer.owner}. "
                f"Start without one of them: --disable-plugin {first.owner.plugin} or "
                f"--disable-plugin {offer.owner.plugin}."
            )
