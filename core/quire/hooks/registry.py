"""All plugins of this process, by kind and name. Choosing among them is `selection`'s work."""

from __future__ import annotations

from collections.abc import Collection
from importlib import resources
from pathlib import Path
from typing import TypeVar

from quire.config import nearest
from quire.errors import ConfigError
from quire.hooks.kinds import KINDS
from quire.hooks.loading import import_plugins, refusal
from quire.hooks.validation import Registered, collect
from quire.interfaces.plugin import (
    AttentionPlugin,
    CheckpointPlugin,
    Descriptor,
    GrammarPlugin,
    LogitsProcessorPlugin,
    ModelPlugin,
    QuantizationPlugin,
    SamplerPlugin,
)

Kind = TypeVar("Kind", bound=Descriptor)


def load_plugins(disabled: Collection[str] = ()) -> Registry:
    """Import every installed plugin that is not disabled and check it.

    `disabled` holds entry-point names, as `quire plugins` shows them.
    Raises: PluginError, naming plugin, distribution and remedy; ConfigError for an unknown name
    in `disabled`.
    """
    return Registry(collect(import_plugins(disabled)), disabled=disabled)


class Registry:
    """What the installed plugins offer. Never imports torch."""

    def __init__(self, found: Collection[Registered], *, disabled: Collection[str] = ()) -> None:
        self.disabled = tuple(sorted(disabled))
        self._by_kind: dict[str, dict[str, Registered]] = {kind: {} for kind in KINDS}
        for entry in found:
            self._by_kind[entry.kind][entry.name] = entry

    def entries(self, kind: str | None = None) -> list[Registered]:
        """Return everything of one kind, or of all kinds, ordered by kind, then by name."""
        kinds = [kind] if kind else list(KINDS)
        return [entry for name in kinds for entry in self._by_kind[name].values()]

    def names(self, kind: str) -> list[str]:
        """Return the names of one kind, sorted."""
        return list(self._by_kind[kind])

    def entry(self, kind: str, name: str) -> Registered:
        """Return one entry. Raises: ConfigError with the installed names and the nearest."""
        entry = self._by_kind[kind].get(name)
        if entry is None:
            raise ConfigError(
                f"unknown {KINDS[kind].title} {name!r}; {self.installed(kind)}."
                f"{nearest(name, self.names(kind))} `quire plugins` lists all; a new plugin "
                f"appears after its package is installed."
            )
        return entry

    def installed(self, kind: str) -> str:
        """Return a kind's names, and the plugins that are switched off, for messages."""
        text = f"installed: {', '.join(self.names(kind)) or 'none'}"
        return text + (f" (disabled: {', '.join(self.disabled)})" if self.disabled else "")

    def attention(self, name: str) -> AttentionPlugin:
        """Return an attention backend. Raises: ConfigError for an unknown name."""
        return self._find("attention", name, AttentionPlugin)

    def quantization(self, name: str) -> QuantizationPlugin:
        """Return a quantization method. Raises: ConfigError for an unknown name."""
        return self._find("quantization", name, QuantizationPlugin)

    def model(self, name: str) -> ModelPlugin:
        """Return a model implementation. Raises: ConfigError for an unknown name."""
        return self._find("model", name, ModelPlugin)

    def sampler(self, name: str) -> SamplerPlugin:
        """Return a sampler. Raises: ConfigError for an unknown name."""
        return self._find("sampler", name, SamplerPlugin)

    def logits_processor(self, name: str) -> LogitsProcessorPlugin:
        """Return a logits processor. Raises: ConfigError for an unknown name."""
        return self._find("logits-processor", name, LogitsProcessorPlugin)

    def grammar(self, name: str) -> GrammarPlugin:
        """Return a grammar engine. Raises: ConfigError for an unknown name."""
        return self._find("grammar", name, GrammarPlugin)

    def models_for(self, architecture: str) -> list[ModelPlugin]:
        """Return the models that claim an architecture, the highest priority first.

        Where nobody claims it, those that can build it all the same.
        """
        models = [self.model(name) for name in self.names("model")]
        claims = [model for model in models if architecture in model.architectures]
        asked = [m for m in models if m.also and self.entry("model", m.name).unusable is None]
        found = claims or [model for model in asked if model.builds(architecture)]
        return sorted(found, key=lambda model: -model.priority)

    def quantization_for(self, quant_method: str) -> list[QuantizationPlugin]:
        """Return the methods that claim a checkpoint format, the highest priority first."""
        methods = [self.quantization(name) for name in self.names("quantization")]
        claims = [method for method in methods if method.reads(quant_method)]
        return sorted(claims, key=lambda method: -method.priority)

    def architectures(self) -> list[str]:
        """Return every architecture that some model claims, sorted."""
        names = self.names("model")
        return sorted({claim for name in names for claim in self.model(name).architectures})

    def checkpoint(self, name: str) -> Path:
        """Return the folder of a bundled checkpoint.

        Raises: ConfigError for an unknown name, PluginError where the folder is not there.
        """
        descriptor = self._find("checkpoint", name, CheckpointPlugin)
        package, _, folder = descriptor.load.partition(":")
        try:
            found = Path(str(resources.files(package).joinpath(folder)))
        except (ImportError, TypeError) as error:  # TypeError: a module that is no package
            fact = f"names {package!r} for checkpoint {name!r}, which is no package"
            raise refusal(self.entry("checkpoint", name).owner, fact) from error
        if not found.is_dir():
            fact = f"has no folder {folder!r} in {package!r} for checkpoint {name!r}"
            raise refusal(self.entry("checkpoint", name).owner, fact)
        return found

    def _find(self, kind: str, name: str, expected: type[Kind]) -> Kind:
        descriptor = self.entry(kind, name).descriptor
        assert isinstance(descriptor, expected), (kind, name, descriptor)
        return descriptor
