"""Import a chosen plugin's class, check it against its contract and ask it what it can serve."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from attrs import frozen

from quire.errors import ConfigError
from quire.hooks.builds import COMES_AFTER, NEVER_PICKED, not_built
from quire.hooks.kinds import KINDS
from quire.hooks.loading import first_line, refusal
from quire.hooks.registry import Registry
from quire.interfaces.plugin import AttentionPlugin, Descriptor, SamplerPlugin, Selection
from quire.patience import telling

Contract = TypeVar("Contract")
Ranked = TypeVar("Ranked", AttentionPlugin, SamplerPlugin)


@frozen(kw_only=True)
class Candidates(Generic[Contract]):
    """The plugins of one kind, whose classes keep `contract`.

    `ask` is put to a class and returns None, or why it cannot serve, in a sentence.
    """

    registry: Registry
    kind: str
    contract: type[Contract]
    ask: Callable[[type[Contract]], str | None]

    def require(self, plugin: Descriptor) -> type[Contract]:
        """Return the class of a plugin that was asked for by name.

        Raises: ConfigError with the reason where it cannot serve.
        """
        reason, found = self._try(plugin, may_build=True)
        if found is None:
            kind = KINDS[self.kind]
            raise ConfigError(
                f"{kind.option} {plugin.name} cannot be used: {reason} "
                f"Ask for another ({self.registry.installed(self.kind)}) or leave the choice out."
            )
        return found

    def answer(self, plugin: Descriptor, *, may_build: bool) -> tuple[type[Contract] | None, str]:
        """Return the class of a plugin that can serve, built or built later; else why not."""
        reason, found = self._try(plugin, may_build=may_build)
        return found, reason

    def best(
        self, plugins: Sequence[Ranked], device: str
    ) -> tuple[Ranked, type[Contract], Selection]:
        """Return the plugin of the highest priority for the device that can serve.

        Raises: ConfigError with everybody's reason where none can.
        """
        device = device.partition(":")[0]
        passed_over = [
            (plugin.name, f"{NEVER_PICKED} on {device}.")
            for plugin in plugins
            if device not in plugin.priority
        ]
        listed = [plugin for plugin in plugins if device in plugin.priority]
        ranked = sorted(listed, key=lambda plugin: -plugin.priority[device])
        for position, plugin in enumerate(ranked, 1):
            reason, found = self._try(plugin, may_build=False)
            if found is not None:
                later = ranked[position:]
                passed_over += [(p.name, comes_after(p.priority[device])) for p in later]
                why = f"priority {plugin.priority[device]} on {device}, the highest that can serve"
                return plugin, found, self._selection(plugin, why, passed_over)
            passed_over.append((plugin.name, reason))
        title = KINDS[self.kind].title
        reasons = "".join(f" {name}: {reason}" for name, reason in passed_over)
        raise ConfigError(
            f"no {title} can serve this model on {device}; "
            f"{self.registry.installed(self.kind)}.{reasons} `quire plugins` lists all."
        )

    def _selection(
        self, plugin: Descriptor, why: str, passed_over: list[tuple[str, str]]
    ) -> Selection:
        unbuilt = [name for name, reason in passed_over if reason == as_sentence(not_built(name))]
        return Selection(
            kind=self.kind,
            requested="auto",
            used=plugin.name,
            why=why,
            passed_over=passed_over,
            unbuilt=unbuilt,
        )

    def _try(self, plugin: Descriptor, *, may_build: bool) -> tuple[str, type[Contract] | None]:
        """Return the class of a plugin that can serve, else why it cannot."""
        entry = self.registry.entry(self.kind, plugin.name)
        if entry.unusable is not None:
            return as_sentence(entry.unusable), None
        if not may_build and not entry.is_built():
            return as_sentence(not_built(plugin.name)), None
        found = self._load(plugin)
        try:
            with telling(f"why_unsupported() of {plugin.name!r}, {entry.owner}"):
                reason = self.ask(found)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            fact = f"fails in why_unsupported() of {plugin.name!r}: {first_line(error)}"
            raise refusal(entry.owner, fact) from error
        if reason is None:
            return "", found
        if not isinstance(reason, str):
            fact = f"returns {reason!r} from why_unsupported() of {plugin.name!r}"
            raise refusal(entry.owner, f"{fact} where None or a sentence is wanted")
        return as_sentence(reason), None

    def _load(self, plugin: Descriptor) -> type[Contract]:
        """Import a plugin's class. Raises: PluginError where it does not keep the contract."""
        owner = self.registry.entry(self.kind, plugin.name).owner
        try:
            with telling(f"the import of {plugin.load!r}, {owner}"):
                found = plugin.load_class()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            cause = error.__cause__ or error
            fact = f"cannot load {plugin.load!r} for {plugin.name!r}: {first_line(cause)}"
            raise refusal(owner, fact) from error
        if not issubclass(found, self.contract):
            fact = f"names {plugin.load!r}, which is not a subclass of {self.contract.__name__}"
            raise refusal(owner, fact)
        if inspect.isabstract(found):
            missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
            raise refusal(owner, f"names {plugin.load!r}, which lacks {missing}")
        for name in getattr(self.contract, "__abstractmethods__", ()):
            if not callable(getattr(found, name)):
                fact = f"names {plugin.load!r}, whose {name!r} cannot be called"
                raise refusal(owner, fact)
        return found


def comes_after(priority: int) -> str:
    """Return why a plugin was not even asked."""
    return f"{COMES_AFTER}, with priority {priority}."


def as_sentence(reason: str) -> str:
    """Return a reason with one full stop at its end."""
    return reason.rstrip(". ") + "."
