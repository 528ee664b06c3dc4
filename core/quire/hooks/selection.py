"""Choose one plugin of a kind: an explicit name is honoured or refused, `auto` says why.

Only attention backends, samplers and logits processors are imported here, since they answer for
a specification; models, quantization methods and checkpoints are chosen by their descriptors.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from quire.config import nearest
from quire.errors import ConfigError
from quire.hooks.builds import build_before_use
from quire.hooks.candidates import Candidates, as_sentence, comes_after
from quire.hooks.invariance import who_is, why_not_invariant
from quire.hooks.kinds import KINDS
from quire.hooks.registry import Registry
from quire.interfaces.attention import (
    NOT_INVARIANT,
    AttentionBackend,
    AttentionSpec,
    why_refused,
)
from quire.interfaces.plugin import (
    AttentionPlugin,
    Descriptor,
    LogitsProcessorPlugin,
    ModelPlugin,
    QuantizationPlugin,
    SamplerPlugin,
    Selection,
)
from quire.interfaces.sampling import LogitsProcessor, Sampler

AUTO = "auto"


class RemoteCode(enum.Enum):
    """Whether a checkpoint carries code for its model, and whether the user trusts it."""

    NONE = enum.auto()
    DISTRUSTED = enum.auto()
    TRUSTED = enum.auto()


NO_QUANTIZATION = "none"

Claimant = TypeVar("Claimant", ModelPlugin, QuantizationPlugin)


def select_attention(
    registry: Registry, requested: str, spec: AttentionSpec
) -> tuple[AttentionPlugin, type[AttentionBackend], Selection]:
    """Choose the attention backend for the layers of `spec`, on `spec.device`.

    Raises: ConfigError where the requested one, or under `auto` every one, cannot serve it.
    """
    candidates = Candidates(
        registry=registry,
        kind="attention",
        contract=AttentionBackend,
        ask=lambda backend: _why_refused(registry, requested, backend, spec),
    )
    if requested != AUTO:
        plugin = registry.attention(requested)
        found, choice = candidates.require(plugin), _as_asked("attention", requested)
        if not registry.entry("attention", requested).is_built():
            choice.why += "; it is not built yet, and the start builds it"
        return plugin, found, choice
    everyone = [registry.attention(name) for name in registry.names("attention")]
    return candidates.best(everyone, spec.device)


def _why_refused(
    registry: Registry, requested: str, backend: type[AttentionBackend], spec: AttentionSpec
) -> str | None:
    """Return why a backend cannot serve, and who can where it is not deterministic enough."""
    reason = why_refused(backend, spec)
    if reason != NOT_INVARIANT or requested == AUTO:
        return reason
    others = who_is(registry, "attention", lambda other: why_refused(other, spec) is None)
    return f"{reason}; {others}"


def answer_attention(
    registry: Registry, plugin: AttentionPlugin, spec: AttentionSpec, *, may_build: bool
) -> tuple[type[AttentionBackend] | None, str]:
    """Return the class of a backend that can serve a spec here, built; else None, and why not.

    `may_build`: compile what is not built yet, which takes as long as it takes.
    Raises: PluginError where its class does not keep the contract, BuildError.
    """
    candidates = Candidates(
        registry=registry,
        kind="attention",
        contract=AttentionBackend,
        ask=lambda backend: why_refused(backend, spec),
    )
    found, reason = candidates.answer(plugin, may_build=may_build)
    if found is not None:
        build_before_use(registry, "attention", plugin.name)
    return found, reason


def require_attention(
    registry: Registry, name: str
) -> tuple[AttentionPlugin, type[AttentionBackend]]:
    """Return an attention backend and its class by name, built, whatever it can serve.

    Raises: ConfigError where it is unknown or cannot be used on this machine, PluginError where
    its class does not keep the contract, BuildError where it cannot be built.
    """
    candidates = Candidates(
        registry=registry, kind="attention", contract=AttentionBackend, ask=lambda _: None
    )
    plugin = registry.attention(name)
    found = candidates.require(plugin)
    build_before_use(registry, "attention", name)
    return plugin, found


def select_sampler(
    registry: Registry, requested: str, device: str, *, batch_invariant: bool = False
) -> tuple[SamplerPlugin, type[Sampler], Selection]:
    """Choose the sampler for a device; `batch_invariant`: one that declares to be so.

    Raises: ConfigError where the requested one, or under `auto` every one, cannot run there.
    """
    candidates = Candidates(
        registry=registry,
        kind="sampler",
        contract=Sampler,
        ask=lambda sampler: (
            (why_not_invariant(registry, "sampler", sampler) if batch_invariant else None)
            or sampler.why_unsupported(device)
        ),
    )
    if requested != AUTO:
        plugin = registry.sampler(requested)
        return plugin, candidates.require(plugin), _as_asked("sampler", requested)
    everyone = [registry.sampler(name) for name in registry.names("sampler")]
    return candidates.best(everyone, device)


def select_logits_processors(
    registry: Registry, names: Iterable[str], *, batch_invariant: bool = False
) -> list[tuple[LogitsProcessorPlugin, type[LogitsProcessor]]]:
    """Return the named logits processors, in the order in which they are named.

    Raises: ConfigError for an unknown, unusable or repeated name, and, where `batch_invariant` is
    asked for, for one that does not declare it.
    """
    candidates = Candidates(
        registry=registry,
        kind="logits-processor",
        contract=LogitsProcessor,
        ask=lambda kind: (
            why_not_invariant(registry, "logits-processor", kind) if batch_invariant else None
        ),
    )
    chosen: dict[str, tuple[LogitsProcessorPlugin, type[LogitsProcessor]]] = {}
    for name in names:
        if name in chosen:
            raise ConfigError(f"--logits-processors names {name!r} twice; name it once.")
        plugin = registry.logits_processor(name)
        chosen[name] = plugin, candidates.require(plugin)
    return list(chosen.values())


def select_model(
    registry: Registry,
    architectures: Sequence[str],
    requested: str = AUTO,
    *,
    remote_code: RemoteCode = RemoteCode.NONE,
) -> tuple[ModelPlugin, Selection]:
    """Choose the model implementation for the architectures that config.json names.

    Trusted code of the checkpoint's own comes after all plugins that build them without.
    Raises: ConfigError where nobody claims one of them, or the requested one does not.
    """
    is_trusted = remote_code is RemoteCode.TRUSTED
    if requested != AUTO:
        plugin = _require(registry, "model", registry.model(requested))
        if not (is_trusted and plugin.runs_remote_code):
            _check_claim(plugin, architectures)
        return plugin, _as_asked("model", requested)
    passed_over: list[tuple[str, str]] = []
    for architecture in architectures:
        claims = registry.models_for(architecture)
        found = _first_usable(registry, "model", claims, passed_over)
        if found is not None:
            why = f"claims {architecture} with priority {found.priority}"
            if architecture not in found.architectures:
                why = f"nobody claims {architecture}, and it can build it, only slower"
            return found, _by_itself("model", found, why, passed_over)
    if is_trusted:
        models = [registry.model(name) for name in registry.names("model")]
        runners = [model for model in models if model.runs_remote_code]
        found = _first_usable(registry, "model", runners, passed_over)
        if found is not None:
            why = (
                f"nobody claims {_listed(architectures)}; it runs the checkpoint's own code, slower"
            )
            return found, _by_itself("model", found, why, passed_over)
    raise ConfigError(_nobody_builds(registry, architectures, passed_over, remote_code))


def select_quantization(
    registry: Registry, requested: str | None, quant_method: str | None
) -> tuple[QuantizationPlugin, Selection]:
    """Choose the quantization method.

    `quant_method` is what the checkpoint's config.json says, None for a full-precision one.
    Raises: ConfigError where nobody reads the format, or the requested one does not.
    """
    if requested is not None and requested != AUTO:
        plugin = _require(registry, "quantization", registry.quantization(requested))
        _check_format(plugin, quant_method)
        return plugin, _as_asked("quantization", requested)
    if quant_method is None:
        plain = _require(registry, "quantization", registry.quantization(NO_QUANTIZATION))
        return plain, _by_itself("quantization", plain, "the checkpoint is not quantized", [])
    passed_over: list[tuple[str, str]] = []
    claims = registry.quantization_for(quant_method)
    found = _first_usable(registry, "quantization", claims, passed_over)
    if found is None:
        raise ConfigError(_nobody_reads(registry, quant_method, passed_over))
    why = f"reads {quant_method!r} with priority {found.priority}"
    return found, _by_itself("quantization", found, why, passed_over)


def parse_attention_options(
    registry: Registry, used: Sequence[AttentionPlugin], given: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Turn `NAME.key=value` texts into the options of the backends that are used, by name.

    Options that are not given have their declared defaults.
    Raises: ConfigError for an unknown name or key, a bad value, or another backend's option.
    """
    values = {
        plugin.name: {key: option.default for key, option in plugin.options.items()}
        for plugin in used
    }
    seen: set[tuple[str, str]] = set()
    for text in given:
        name, key, value = _parse_option(registry, used, text)
        if (name, key) in seen:
            raise ConfigError(f"--attention-option {text}: {key!r} is given twice; give it once.")
        seen.add((name, key))
        values[name][key] = value
    return values


def _parse_option(
    registry: Registry, used: Sequence[AttentionPlugin], text: str
) -> tuple[str, str, Any]:
    target, equals, value = text.partition("=")
    name, dot, key = target.rpartition(".")
    if not (equals and dot and name and key):
        raise ConfigError(f"--attention-option {text}: write it as NAME.key=value.")
    plugin = registry.attention(name)
    if name not in [one.name for one in used]:
        in_use = " and ".join(dict.fromkeys(repr(one.name) for one in used))
        raise ConfigError(
            f"--attention-option {text}: the attention backend in use is {in_use}. "
            f"Remove the option, or ask for --attention-backend {name}."
        )
    option = plugin.options.get(key)
    if option is None:
        raise ConfigError(
            f"--attention-option {text}: {name!r} has no option {key!r}."
            f"{nearest(key, plugin.options)} It has: {', '.join(plugin.options) or 'none'}."
        )
    try:
        return name, key, option.parse(value)
    except ValueError as error:
        raise ConfigError(
            f"--attention-option {text}: {error}. Meaning: {option.meaning}; "
            f"default: {option.default}."
        ) from error


def _as_asked(kind: str, requested: str) -> Selection:
    return Selection(kind=kind, requested=requested, used=requested, why="asked for by name")


def _by_itself(
    kind: str, plugin: Descriptor, why: str, passed_over: list[tuple[str, str]]
) -> Selection:
    return Selection(kind=kind, requested=AUTO, used=plugin.name, why=why, passed_over=passed_over)


def _require(registry: Registry, kind: str, plugin: Claimant) -> Claimant:
    reason = registry.entry(kind, plugin.name).unusable
    if reason is not None:
        raise ConfigError(
            f"{KINDS[kind].title} {plugin.name!r} cannot be used here: {as_sentence(reason)} "
            f"Leave the choice out, or ask for another ({registry.installed(kind)})."
        )
    return plugin


def _first_usable(
    registry: Registry,
    kind: str,
    claims: Sequence[Claimant],
    passed_over: list[tuple[str, str]],
) -> Claimant | None:
    """Return the first claimant that works here; write down why the ones before it do not."""
    for position, plugin in enumerate(claims, 1):
        reason = registry.entry(kind, plugin.name).unusable
        if reason is None:
            passed_over += [(p.name, comes_after(p.priority)) for p in claims[position:]]
            return plugin
        passed_over.append((plugin.name, as_sentence(reason)))
    return None


def _check_claim(plugin: ModelPlugin, architectures: Sequence[str]) -> None:
    if not any(plugin.builds(architecture) for architecture in architectures):
        raise ConfigError(
            f"--model-implementation {plugin.name} does not build {_listed(architectures)}; "
            f"it builds {_listed(plugin.architectures)}. Leave the option out to use whatever does."
        )


def _check_format(plugin: QuantizationPlugin, quant_method: str | None) -> None:
    asked = f"--quantization {plugin.name}"
    if quant_method is not None and not plugin.reads(quant_method):
        raise ConfigError(
            f"{asked} does not read this checkpoint, which is quantized as {quant_method!r}; it "
            f"reads {_listed(plugin.formats)}. Leave the option out to use whatever does."
        )
    if quant_method is None and not plugin.on_the_fly and plugin.name != NO_QUANTIZATION:
        raise ConfigError(
            f"{asked} needs a checkpoint that was quantized with it; this one has no "
            f"quantization_config. Leave the option out, or take another checkpoint."
        )


def _nobody_builds(
    registry: Registry,
    architectures: Sequence[str],
    passed_over: list[tuple[str, str]],
    remote_code: RemoteCode,
) -> str:
    known = registry.architectures()
    close = difflib.get_close_matches(architectures[0], known, n=3, cutoff=0.6)
    hint = f" Nearest: {_listed(close)}." if close else ""
    if remote_code is RemoteCode.DISTRUSTED:
        hint += " The checkpoint carries code for it, which --trust-remote-code runs."
    return (
        f"no installed plugin builds {_listed(architectures)}.{hint}{_reasons(passed_over)} "
        f"Install a plugin that claims it, or write one: docs/write-a-plugin.md shows how. "
        f"Registered architectures, as `quire plugins --architectures` lists them: "
        f"{_listed(known)}."
    )


def _nobody_reads(registry: Registry, quant_method: str, passed_over: list[tuple[str, str]]) -> str:
    methods = [registry.quantization(name) for name in registry.names("quantization")]
    formats = sorted({claim for method in methods for claim in method.formats})
    return (
        f"no installed plugin reads a checkpoint with quant_method {quant_method!r}."
        f"{nearest(quant_method, formats)}{_reasons(passed_over)} Formats that can be read: "
        f"{_listed(formats)}. Install a plugin for it, or take another checkpoint."
    )


def _reasons(passed_over: list[tuple[str, str]]) -> str:
    return "".join(f" {name} cannot be used here: {reason}" for name, reason in passed_over)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
