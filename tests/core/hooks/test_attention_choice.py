"""`prefill=NAME,decode=NAME` takes two backends of one KV layout, and refuses all else clearly."""

from __future__ import annotations

from typing import Any

import pytest
from fake_classes import SPEC, FakeBackend, add_class
from fake_distributions import Installed, attention, returning

from quire.errors import ConfigError, PluginError
from quire.hooks.attention_choice import choose_attention, parts_asked_for
from quire.hooks.registry import Registry, load_plugins
from quire.hooks.selection import parse_attention_options
from quire.interfaces.attention import AttentionSpec, KVLayout
from quire.interfaces.plugin import PluginOption

NUMBER = PluginOption(meaning="a number", default=1, parse=int)


class OtherName(FakeBackend):
    @classmethod
    def kv_layout(cls, spec: AttentionSpec) -> KVLayout:
        return KVLayout(name="other", block_shape=(1,), dtype=spec.kv_dtype)


class OtherShape(FakeBackend):
    @classmethod
    def kv_layout(cls, spec: AttentionSpec) -> KVLayout:
        return KVLayout(name="fake", block_shape=(2,), dtype=spec.kv_dtype)


class OtherDtype(FakeBackend):
    @classmethod
    def kv_layout(cls, spec: AttentionSpec) -> KVLayout:
        return KVLayout(name="fake", block_shape=(1,), dtype="float16")


class NoLayout(FakeBackend):
    @classmethod
    def kv_layout(cls, spec: AttentionSpec) -> KVLayout:
        raise RuntimeError("boom")


def registry_of(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, other: type = FakeBackend, **values: Any
) -> Registry:
    """Return a registry with backends `a` and `b`, of which b is of another class."""
    backends = [
        attention("a", add_class(monkeypatch, FakeBackend), options={"n": NUMBER}),
        attention("b", add_class(monkeypatch, other, values.get("answer")), options={"n": NUMBER}),
    ]
    installed.plugin("mine", "stranger", quire_attention_backends=returning(backends))
    return load_plugins()


@pytest.mark.parametrize(
    ("requested", "parts"),
    [
        ("a", {"all": "a"}),
        ("auto", {"all": "auto"}),
        ("prefill=a,decode=b.c", {"prefill": "a", "decode": "b.c"}),
        ("decode=b, prefill=a", {"prefill": "a", "decode": "b"}),
        ("prefill=a,decode=a", {"prefill": "a", "decode": "a"}),
    ],
)
def test_parts_are_read_in_any_order(requested: str, parts: dict[str, str]) -> None:
    assert parts_asked_for(requested) == parts


@pytest.mark.parametrize(
    ("requested", "fact"),
    [
        ("prefill=", "'prefill' names no backend"),
        ("prefill=a", "'decode' is missing"),
        ("decode=a", "'prefill' is missing"),
        ("prefill=a,decode=", "'decode' names no backend"),
        ("prefill=a,decode", "'decode' names no backend"),
        ("prefill=a,prefill=b", "'prefill' is there twice"),
        ("prefill=a,decode=b,decode=c", "'decode' is there twice"),
        ("prefill=a,decoding=b", "'decoding' is no part of it"),
        ("prefill=a,decode=b,", "a part has no name"),
        ("a,b", "'a' is no part of it"),
        ("prefill=a,decode=auto", "'decode' names 'auto', no backend"),
        ("prefill=a=b,decode=c", "'prefill' names 'a=b', no backend"),
    ],
)
def test_misspelt_parts_are_refused_saying_what_is_allowed(requested: str, fact: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parts_asked_for(requested)

    assert str(caught.value).startswith(f"--attention-backend {requested}: {fact}; allowed: auto,")


def test_two_of_one_layout_are_chosen_and_told_as_one(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = registry_of(installed, monkeypatch)

    choice = choose_attention(registry, "decode=b,prefill=a", SPEC)

    assert {part: plugin.name for part, (plugin, _) in choice.parts.items()} == {
        "prefill": "a",
        "decode": "b",
    }
    assert choice.selection.requested == "decode=b,prefill=a"
    assert choice.selection.used == "prefill=a,decode=b"
    assert choice.selection.why == (
        "asked for by name; both keep KV blocks as 'fake' ([1] of float32 a block)"
    )


@pytest.mark.parametrize(
    ("other", "kept"),
    [
        (OtherName, "'other' ([1] of float32 a block)"),
        (OtherShape, "'fake' ([2] of float32 a block)"),
        (OtherDtype, "'fake' ([1] of float16 a block)"),
    ],
)
def test_two_of_different_layouts_are_refused_naming_both(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, other: type, kept: str
) -> None:
    registry = registry_of(installed, monkeypatch, other)

    with pytest.raises(ConfigError) as caught:
        choose_attention(registry, "prefill=a,decode=b", SPEC)

    assert f"since 'a' keeps 'fake' ([1] of float32 a block) and 'b' keeps {kept}." in str(
        caught.value
    )


def test_a_part_that_cannot_serve_is_refused_by_name(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = registry_of(installed, monkeypatch, answer="it has no windows")

    with pytest.raises(ConfigError, match="--attention-backend b cannot be used: it has no windo"):
        choose_attention(registry, "prefill=a,decode=b", SPEC)


def test_a_layout_that_cannot_be_asked_for_is_the_plugins_error(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = registry_of(installed, monkeypatch, NoLayout)

    with pytest.raises(PluginError, match=r"of stranger 1.0 fails in kv_layout\(\) of 'b': Runt"):
        choose_attention(registry, "prefill=a,decode=b", SPEC)


def test_options_reach_each_of_two_backends(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = registry_of(installed, monkeypatch)
    both = [registry.attention("a"), registry.attention("b")]

    assert parse_attention_options(registry, both, ["b.n=7"]) == {"a": {"n": 1}, "b": {"n": 7}}
    assert parse_attention_options(registry, both, ["b.n=7", "a.n=3"]) == {
        "a": {"n": 3},
        "b": {"n": 7},
    }
