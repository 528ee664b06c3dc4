"""An explicit backend is honoured or refused; `auto` picks the best and says why not others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
from fake_classes import SPEC, FakeBackend, add_class
from fake_distributions import Installed, attention, raising, returning

from quire.errors import ConfigError, PluginError
from quire.hooks.registry import Registry, load_plugins
from quire.hooks.selection import parse_attention_options, select_attention
from quire.interfaces.plugin import AttentionPlugin, PluginOption

Make = Callable[..., AttentionPlugin]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Return a function that makes a descriptor whose class gives an answer to a spec."""

    def make(name: str, answer: Any = None, **values: Any) -> AttentionPlugin:
        return attention(name, add_class(monkeypatch, FakeBackend, answer), **values)

    return make


def registry_of(installed: Installed, *backends: AttentionPlugin) -> Registry:
    """Return a registry with the backends of one plugin."""
    installed.plugin("mine", "stranger", quire_attention_backends=returning(list(backends)))
    return load_plugins()


def test_auto_attention_picks_the_highest_priority_on_the_device(
    installed: Installed, make: Make
) -> None:
    registry = registry_of(
        installed,
        make("slow", priority={"cpu": 1, "cuda": 99}),
        make("fast", priority={"cpu": 50}),
        make("gpu-only", priority={"cuda": 100}),
    )

    plugin, found, selection = select_attention(registry, "auto", SPEC)

    assert plugin.name == selection.used == "fast"
    assert found is plugin.load_class()
    assert (selection.kind, selection.requested) == ("attention", "auto")
    assert selection.why == "priority 50 on cpu, the highest that can serve"
    assert selection.passed_over == [
        ("gpu-only", "auto never picks it on cpu."),
        ("slow", "it comes after, with priority 1."),
    ]


def test_auto_attention_settles_a_tie_by_name(installed: Installed, make: Make) -> None:
    registry = registry_of(
        installed, make("b", priority={"cpu": 5}), make("a", priority={"cpu": 5})
    )

    assert select_attention(registry, "auto", SPEC)[0].name == "a"


def test_auto_attention_reads_the_kind_of_an_indexed_device(
    installed: Installed, make: Make
) -> None:
    registry = registry_of(installed, make("a", priority={"cuda": 5}))

    spec = attrs.evolve(SPEC, device="cuda:1")

    assert select_attention(registry, "auto", spec)[0].name == "a"


def test_auto_attention_says_whom_it_passed_over_and_why(installed: Installed, make: Make) -> None:
    registry = registry_of(
        installed,
        attention("a", priority={"cpu": 9}, why_unusable=returning("it is not built.")),
        make("b", "head_dim is 16, and it takes 64", priority={"cpu": 8}),
        make("c", priority={"cpu": 7}),
        make("d", priority={"cpu": 6}),
    )

    _, _, selection = select_attention(registry, "auto", SPEC)

    assert selection.used == "c"
    assert selection.passed_over == [
        ("a", "it is not built."),
        ("b", "head_dim is 16, and it takes 64."),
        ("d", "it comes after, with priority 6."),
    ]


def test_auto_attention_without_a_candidate_lists_every_reason(
    installed: Installed, make: Make
) -> None:
    registry = registry_of(
        installed,
        make("a", "it takes no sinks", priority={"cpu": 9}),
        make("b", priority={"cuda": 9}),
    )

    with pytest.raises(ConfigError) as caught:
        select_attention(registry, "auto", SPEC)

    assert str(caught.value) == (
        "no attention backend can serve this model on cpu; installed: a, b. "
        "b: auto never picks it on cpu. a: it takes no sinks. `quire plugins` lists all."
    )


def test_auto_attention_imports_only_the_candidates_it_asks(
    installed: Installed, make: Make
) -> None:
    registry = registry_of(
        installed,
        make("fast", priority={"cpu": 9}),
        attention("slow", "a_module_that_is_not_there:C", priority={"cpu": 1}),
    )

    assert select_attention(registry, "auto", SPEC)[0].name == "fast"


def test_explicit_attention_is_used_whatever_its_priority(installed: Installed, make: Make) -> None:
    registry = registry_of(installed, make("fast", priority={"cpu": 9}), make("mine"))

    plugin, _, selection = select_attention(registry, "mine", SPEC)

    assert plugin.name == "mine"
    assert (selection.requested, selection.used) == ("mine", "mine")
    assert selection.why == "asked for by name"


def test_explicit_attention_refuses_an_unknown_name_with_the_nearest(
    installed: Installed, make: Make
) -> None:
    registry = registry_of(installed, make("reference"), make("triton"))

    with pytest.raises(ConfigError) as caught:
        select_attention(registry, "tritan", SPEC)

    assert str(caught.value).startswith(
        "unknown attention backend 'tritan'; installed: reference, triton. Did you mean 'triton'?"
    )


def test_explicit_attention_names_the_disabled_plugins_when_unknown(
    installed: Installed, make: Make
) -> None:
    installed.plugin("attention-triton", quire_attention_backends=returning([make("triton")]))
    installed.plugin("other", quire_attention_backends=returning([make("reference")]))

    with pytest.raises(ConfigError, match=r"reference \(disabled: attention-triton\)"):
        select_attention(load_plugins(["attention-triton"]), "triton", SPEC)


def test_explicit_attention_is_refused_where_it_is_unusable(
    installed: Installed, make: Make
) -> None:
    broken = attention("mine", why_unusable=returning("nvcc is not installed"))
    registry = registry_of(installed, broken, make("other", priority={"cpu": 1}))

    with pytest.raises(ConfigError) as caught:
        select_attention(registry, "mine", SPEC)

    assert str(caught.value).startswith(
        "--attention-backend mine cannot be used: nvcc is not installed. Ask for another"
    )


def test_explicit_attention_is_refused_where_it_does_not_support_the_spec(
    installed: Installed, make: Make
) -> None:
    registry = registry_of(installed, make("mine", "it has no sliding window"))

    with pytest.raises(ConfigError, match="mine cannot be used: it has no sliding window. Ask"):
        select_attention(registry, "mine", SPEC)


@pytest.mark.parametrize("requested", ["auto", "mine"])
@pytest.mark.parametrize(
    ("answer", "fact"),
    [
        (RuntimeError("boom"), "fails in why_unsupported() of 'mine': RuntimeError: boom."),
        (False, "returns False from why_unsupported() of 'mine' where None or a sentence"),
    ],
)
def test_attention_with_a_broken_why_unsupported_is_the_plugins_error(
    installed: Installed, make: Make, requested: str, answer: Any, fact: str
) -> None:
    registry = registry_of(installed, make("mine", answer, priority={"cpu": 1}))

    with pytest.raises(PluginError) as caught:
        select_attention(registry, requested, SPEC)

    assert str(caught.value).startswith(f"plugin 'mine' of stranger 1.0 {fact}")


@pytest.mark.parametrize("requested", ["auto", "mine"])
@pytest.mark.parametrize(
    ("load", "fact"),
    [
        ("a_module_that_is_not_there:C", "for 'mine': ModuleNotFoundError: No module named"),
        ("fake_classes:Missing", "for 'mine': AttributeError: module 'fake_classes' has no"),
        ("fake_classes:SPEC", "'fake_classes:SPEC' is not a class"),
        ("fake_classes:FakeSampler", "which is not a subclass of AttentionBackend."),
        ("fake_classes:UnfinishedBackend", "which lacks attend."),
        ("fake_classes:BackendWithoutPlan", "whose 'plan' cannot be called."),
    ],
)
def test_attention_whose_class_breaks_the_contract_is_the_plugins_error(
    installed: Installed, requested: str, load: str, fact: str
) -> None:
    registry = registry_of(installed, attention("mine", load, priority={"cpu": 1}))

    with pytest.raises(PluginError) as caught:
        select_attention(registry, requested, SPEC)

    message = str(caught.value)
    assert message.startswith("plugin 'mine' of stranger 1.0")
    assert fact in message
    assert message.endswith("--disable-plugin mine.")


OPTIONS = {
    "num_splits": PluginOption(meaning="splits of a sequence", default=4, parse=int),
    "mode": PluginOption(meaning="which kernel", default="plain", parse=str),
}


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ([], {"num_splits": 4, "mode": "plain"}),
        (["my.backend.num_splits=8"], {"num_splits": 8, "mode": "plain"}),
        (
            ["my.backend.mode=a=b,c", "my.backend.num_splits=1"],
            {"num_splits": 1, "mode": "a=b,c"},
        ),
    ],
)
def test_attention_options_are_parsed_as_declared(
    installed: Installed, make: Make, given: list[str], values: dict[str, Any]
) -> None:
    registry = registry_of(installed, make("my.backend", options=OPTIONS))

    used = [registry.attention("my.backend")]
    assert parse_attention_options(registry, used, given) == {"my.backend": values}


@pytest.mark.parametrize(
    ("given", "fact"),
    [
        ("mine.num_split=8", "'mine' has no option 'num_split'. Did you mean 'num_splits'? It has"),
        ("mine.num_splits=many", "invalid literal for int"),
        ("other.num_splits=8", "the attention backend in use is 'mine'. Remove the option, or ask"),
        ("nobody.num_splits=8", "unknown attention backend 'nobody'; installed: mine, other."),
        ("mine.num_splits", "write it as NAME.key=value."),
        ("num_splits=8", "write it as NAME.key=value."),
        ("=8", "write it as NAME.key=value."),
    ],
)
def test_attention_options_that_cannot_be_used_are_refused(
    installed: Installed, make: Make, given: str, fact: str
) -> None:
    registry = registry_of(installed, make("mine", options=OPTIONS), make("other", options=OPTIONS))

    with pytest.raises(ConfigError) as caught:
        parse_attention_options(registry, [registry.attention("mine")], [given])

    assert fact in str(caught.value)


def test_attention_options_given_twice_are_refused(installed: Installed, make: Make) -> None:
    registry = registry_of(installed, make("mine", options=OPTIONS))

    with pytest.raises(ConfigError, match="'num_splits' is given twice"):
        parse_attention_options(
            registry, [registry.attention("mine")], ["mine.num_splits=1", "mine.num_splits=2"]
        )


def test_selection_without_attention_backends_says_so(installed: Installed) -> None:
    with pytest.raises(ConfigError, match="on cpu; installed: none."):
        select_attention(load_plugins(), "auto", SPEC)


def test_attention_of_a_plugin_that_exits_on_import_is_the_plugins_error(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = registry_of(installed, attention("mine"))
    monkeypatch.setattr(AttentionPlugin, "load_class", lambda _: raising(SystemExit(1))())

    with pytest.raises(PluginError, match="cannot load 'nowhere:Nothing' for 'mine': SystemExit"):
        select_attention(registry, "mine", SPEC)


@pytest.mark.parametrize("requested", ["mine", "auto"])
def test_attention_that_does_not_declare_a_quantized_cache_is_not_asked(
    installed: Installed, make: Make, requested: str
) -> None:
    """A backend that is older than such caches would say yes."""
    registry = registry_of(installed, make("mine", priority={"cpu": 1}))
    spec = attrs.evolve(SPEC, kv_dtype="float8_e4m3fn")

    with pytest.raises(ConfigError) as caught:
        select_attention(registry, requested, spec)

    assert "it has no float8_e4m3fn KV cache: its `quantized_kv` does not name it" in str(
        caught.value
    )


def test_attention_that_declares_a_quantized_cache_is_asked(
    installed: Installed, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeBackend, "quantized_kv", ("float8_e5m2",))
    registry = registry_of(installed, make("mine"))

    _, _, selection = select_attention(registry, "mine", attrs.evolve(SPEC, kv_dtype="float8_e5m2"))

    assert selection.used == "mine"
    with pytest.raises(ConfigError, match="no float8_e4m3fn KV cache"):
        select_attention(registry, "mine", attrs.evolve(SPEC, kv_dtype="float8_e4m3fn"))
