"""Choose the attention of one spec: one backend, or one for prompts and one for single tokens."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from quire.errors import ConfigError
from quire.hooks.loading import first_line, refusal
from quire.hooks.registry import Registry
from quire.hooks.selection import AUTO, select_attention
from quire.interfaces.attention import AttentionBackend, AttentionSpec, KVLayout
from quire.interfaces.plugin import AttentionPlugin, Selection

ALL, PREFILL, DECODE = "all", "prefill", "decode"
Found = tuple[AttentionPlugin, type[AttentionBackend]]


@frozen(kw_only=True)
class AttentionChoice:
    """What serves the layers of one spec, by part: `all`, or `prefill` and `decode`."""

    parts: Mapping[str, Found]
    selection: Selection

    @property
    def plugins(self) -> list[AttentionPlugin]:
        """Return the descriptors, one a part."""
        return [plugin for plugin, _ in self.parts.values()]


def parts_asked_for(requested: str) -> dict[str, str]:
    """Return backend names by part, from NAME or `prefill=NAME,decode=NAME`.

    Raises: ConfigError for another spelling.
    """
    if "=" not in requested and "," not in requested:
        return {ALL: requested}
    names: dict[str, str] = {}
    for text in requested.split(","):
        part, _, name = (piece.strip() for piece in text.partition("="))
        is_name = name not in ("", AUTO) and "=" not in name
        if part not in (PREFILL, DECODE) or part in names or not is_name:
            raise _misspelt(requested, _fact(part, name, is_known=part in names))
        names[part] = name
    missing = [part for part in (PREFILL, DECODE) if part not in names]
    if missing:
        raise _misspelt(requested, f"{missing[0]!r} is missing")
    return {part: names[part] for part in (PREFILL, DECODE)}


def _fact(part: str, name: str, *, is_known: bool) -> str:
    if part not in (PREFILL, DECODE):
        return f"{part!r} is no part of it" if part else "a part has no name"
    if is_known:
        return f"{part!r} is there twice"
    return f"{part!r} names {name!r}, no backend" if name else f"{part!r} names no backend"


def _misspelt(requested: str, fact: str) -> ConfigError:
    return ConfigError(
        f"--attention-backend {requested}: {fact}; allowed: auto, NAME, or "
        f"prefill=NAME,decode=NAME with two backends that share a KV layout."
    )


def choose_attention(registry: Registry, requested: str, spec: AttentionSpec) -> AttentionChoice:
    """Choose the backend, or both, for the layers of `spec`.

    Raises: ConfigError where one cannot serve them, or two do not share a KV layout.
    """
    names = parts_asked_for(requested)
    if ALL in names:
        plugin, found, selection = select_attention(registry, requested, spec)
        return AttentionChoice(parts={ALL: (plugin, found)}, selection=selection)
    if spec.batch_invariant and names[PREFILL] != names[DECODE]:
        raise ConfigError(
            f"--attention-backend {requested}: with --deterministic one backend serves all steps, "
            f"since two do not give the same bits. Take one for both."
        )
    parts: dict[str, Found] = {}
    for part, name in names.items():
        plugin, found, _ = select_attention(registry, name, spec)
        parts[part] = plugin, found
    prefill, decode = (_layout(registry, *found, spec) for found in parts.values())
    if prefill != decode:
        raise ConfigError(
            f"--attention-backend {requested}: the two share no KV cache, since "
            f"{names[PREFILL]!r} keeps {prefill} and {names[DECODE]!r} keeps {decode}. Take two "
            f"whose name, shape and dtype agree, or one for both."
        )
    selection = Selection(
        kind="attention",
        requested=requested,
        used=",".join(f"{part}={name}" for part, name in names.items()),
        why=f"asked for by name; both keep KV blocks as {prefill}",
    )
    for name in dict.fromkeys(names.values()):
        if not registry.entry("attention", name).is_built():
            selection.why += f"; {name} is not built yet, and the start builds it"
    return AttentionChoice(parts=parts, selection=selection)


def _layout(
    registry: Registry, plugin: AttentionPlugin, found: type[AttentionBackend], spec: AttentionSpec
) -> KVLayout:
    try:
        return found.kv_layout(spec)
    except Exception as error:
        owner = registry.entry("attention", plugin.name).owner
        fact = f"fails in kv_layout() of {plugin.name!r}: {first_line(error)}"
        raise refusal(owner, fact) from error
