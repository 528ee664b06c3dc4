"""Check what is installed: a plugin by its kind and name, or a module of operations by its name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from attrs import evolve, frozen

from quire.errors import ConfigError
from quire.hooks.candidates import Candidates
from quire.hooks.parser_choice import require_reasoning_parser, require_tool_call_parser
from quire.hooks.registry import Registry
from quire.hooks.selection import require_attention
from quire.interfaces.grammar import GrammarEngine
from quire.interfaces.model import Model
from quire.interfaces.quantization import QuantizationMethod
from quire.interfaces.sampling import LogitsProcessor, Sampler
from quire.testing.kit import iter_attention
from quire.testing.kit_grammar import GrammarSubject, iter_grammar
from quire.testing.kit_model import ModelSubject, iter_model
from quire.testing.kit_ops import iter_ops
from quire.testing.kit_parser import iter_parser
from quire.testing.kit_processor import ProcessorSubject, guessed_arguments, iter_processor
from quire.testing.kit_quantization import QuantizationSubject, iter_quantization
from quire.testing.kit_report import CheckResult
from quire.testing.kit_sampler import SamplerSubject, iter_sampler
from quire.testing.search import check_device


@frozen(kw_only=True)
class Settings:
    """How much is looked at, where, and the seed of the cases."""

    profile: str = "quick"
    device: str = "cpu"
    seed: int = 0

    @property
    def drawn(self) -> dict[str, Any]:
        """What every door takes."""
        return {"profile": self.profile, "seed": self.seed}


def _attention(registry: Registry, name: str, settings: Settings) -> Iterator[CheckResult]:
    plugin, backend = require_attention(registry, name)
    options = {key: option.default for key, option in plugin.options.items()}
    return iter_attention(backend, device=settings.device, options=options, **settings.drawn)


def _quantization(registry: Registry, name: str, settings: Settings) -> Iterator[CheckResult]:
    method = _require(registry, "quantization", name, QuantizationMethod)
    subject = QuantizationSubject(
        method=method, config=method.example_config, device=settings.device
    )
    return iter_quantization(subject, **settings.drawn)


def _sampler(registry: Registry, name: str, settings: Settings) -> Iterator[CheckResult]:
    sampler = _require(registry, "sampler", name, Sampler)
    subject = SamplerSubject(sampler=sampler, device=settings.device)
    return iter_sampler(subject, **settings.drawn)


def _processor(registry: Registry, name: str, settings: Settings) -> Iterator[CheckResult]:
    processor = _require(registry, "logits-processor", name, LogitsProcessor)
    arguments = guessed_arguments(processor)
    subject = ProcessorSubject(processor=processor, arguments=arguments, device=settings.device)
    return iter_processor(subject, **settings.drawn)


def _model(registry: Registry, name: str, settings: Settings) -> Iterator[CheckResult]:
    model, plugin = _require(registry, "model", name, Model), registry.model(name)
    for architecture in plugin.architectures:
        subject = ModelSubject(
            model=model,
            config_class=plugin.config_class,
            architecture=architecture,
            task=plugin.task,
            device=settings.device,
        )
        several = len(plugin.architectures) > 1
        for result in iter_model(subject, **settings.drawn):
            own = f"{architecture}: {result.name}" if several else result.name
            yield evolve(result, name=own)


def _grammar(registry: Registry, name: str, settings: Settings) -> Iterator[CheckResult]:
    engine = _require(registry, "grammar", name, GrammarEngine)
    return iter_grammar(GrammarSubject(engine), **settings.drawn)


def _tool_calls(registry: Registry, name: str, settings: Settings) -> Iterator[CheckResult]:
    return iter_parser(require_tool_call_parser(registry, name), **settings.drawn)


def _reasoning(registry: Registry, name: str, settings: Settings) -> Iterator[CheckResult]:
    return iter_parser(require_reasoning_parser(registry, name), **settings.drawn)


KINDS: dict[str, Callable[[Registry, str, Settings], Iterator[CheckResult]]] = {
    "attention": _attention,
    "quantization": _quantization,
    "sampler": _sampler,
    "logits-processor": _processor,
    "model": _model,
    "grammar": _grammar,
    "tool-call-parser": _tool_calls,
    "reasoning-parser": _reasoning,
}


def _require(registry: Registry, kind: str, name: str, contract: type[Any]) -> Any:
    """Return a plugin's class, whatever it can serve.

    Raises: ConfigError where it cannot be used on this machine, PluginError where its class does
    not keep the contract.
    """
    candidates = Candidates(registry=registry, kind=kind, contract=contract, ask=lambda _: None)
    return candidates.require(registry.entry(kind, name).descriptor)


def iter_plugin(
    registry: Registry, kind: str, name: str, settings: Settings
) -> Iterator[CheckResult]:
    """Yield the result of each check of an installed plugin as it ends.

    Raises: ConfigError for a device that is not there, a plugin that cannot be used here or that
    serves nothing that the kit asks for; PluginError where its class does not keep the contract.
    """
    check_device(settings.device)
    yield from KINDS[kind](registry, name, settings)


def iter_module(module: str, settings: Settings) -> Iterator[CheckResult]:
    """Yield the result of each operation of a module as it ends.

    Raises: ConfigError for a device that is not there, or a module that cannot be imported.
    """
    check_device(settings.device)
    try:
        ops = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"--ops {module}: it cannot be imported: {error}.") from error
    yield from iter_ops(ops, device=settings.device, **settings.drawn)
