"""A plugin that cannot be trusted stops the start with one line: plugin, distribution, remedy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from fake_distributions import Installed, attention, model, raising, returning

from quire.errors import ConfigError, PluginError
from quire.hooks.registry import load_plugins
from quire.interfaces.plugin import API_VERSION, QuantizationPlugin

MAJOR, MINOR = API_VERSION


def refused(*, disabled: tuple[str, ...] = ()) -> str:
    """Load the plugins, which must be refused, and return the one line that says why."""
    with pytest.raises(PluginError) as caught:
        load_plugins(disabled)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_load_plugins_returns_what_every_distribution_offers(installed: Installed) -> None:
    installed.plugin(
        "one", "alpha", quire_attention_backends=returning([attention("a"), attention("b")])
    )
    installed.plugin("two", "beta", quire_attention_backends=returning([attention("c")]))

    registry = load_plugins()

    assert registry.names("attention") == ["a", "b", "c"]
    entry = registry.entry("attention", "c")
    assert str(entry.owner) == "plugin 'two' of beta 1.0"
    assert entry.api_version == API_VERSION


def test_load_plugins_without_any_plugin_is_empty(installed: Installed) -> None:
    assert load_plugins().entries() == []


def test_load_plugins_ignores_other_entry_point_groups(installed: Installed) -> None:
    installed.distribution("other")
    installed._distributions[0]._files["entry_points.txt"] = "[console_scripts]\nquire = none:at\n"

    assert load_plugins().entries() == []


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named"),
        ("def broken(:", "SyntaxError: invalid syntax"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise ValueError('first line\\nsecond line')", "ValueError: first line second line"),
        ("import ctypes; ctypes.CDLL('libnothing.so')", "OSError: libnothing.so"),
        ("class Odd(BaseException): pass\nraise Odd", "Odd"),
    ],
)
def test_load_plugins_refuses_a_plugin_that_fails_to_import(
    installed: Installed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    cause: str,
) -> None:
    (tmp_path / "quire_broken_plugin.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "quire_broken_plugin", raising=False)
    installed.distribution("broken", "0.3", my_plugin="quire_broken_plugin")

    message = refused()

    assert message.startswith(f"plugin 'my-plugin' of broken 0.3 cannot be imported: {cause}")
    assert message.endswith(
        "Reinstall or upgrade broken, or start without it: --disable-plugin my-plugin."
    )


def test_load_plugins_does_not_import_a_disabled_plugin(installed: Installed) -> None:
    installed.distribution("broken", my_plugin="a_module_that_is_not_there")

    assert load_plugins(["my-plugin"]).disabled == ("my-plugin",)


def test_load_plugins_lets_an_interrupt_through(
    installed: Installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quire_interrupted_plugin.py").write_text("raise KeyboardInterrupt")
    monkeypatch.syspath_prepend(tmp_path)
    installed.distribution("slow", my_plugin="quire_interrupted_plugin")

    with pytest.raises(KeyboardInterrupt):
        load_plugins()


def test_disable_plugin_refuses_an_unknown_name_with_the_nearest(installed: Installed) -> None:
    installed.plugin("attention-one", quire_attention_backends=returning([]))
    installed.plugin("models-one", quire_models=returning([]))

    with pytest.raises(ConfigError) as caught:
        load_plugins(["attention-oen"])

    assert str(caught.value) == (
        "--disable-plugin attention-oen: no such plugin is installed. Did you mean "
        "'attention-one'? Installed: attention-one, models-one."
    )


def test_load_plugins_refuses_a_plugin_without_api_version(installed: Installed) -> None:
    installed.plugin("mine", "stranger", QUIRE_API_VERSION=None)

    message = refused()

    assert message.startswith("plugin 'mine' of stranger 1.0 does not say for which version")
    assert f"QUIRE_API_VERSION = {API_VERSION}" in message
    assert "--disable-plugin mine" in message


@pytest.mark.parametrize(
    "declared", [1, "1.0", (1,), (1, 0, 0), (1.0, 0), (True, False), ("1", "0"), [1, 0], (-1, 0)]
)
def test_load_plugins_refuses_an_api_version_that_is_no_pair_of_integers(
    installed: Installed, declared: Any
) -> None:
    installed.plugin("mine", "stranger", QUIRE_API_VERSION=declared)

    message = refused()

    assert f"has QUIRE_API_VERSION = {declared!r}, which is not a pair" in message
    assert "plugin 'mine' of stranger 1.0" in message


@pytest.mark.parametrize(
    ("declared", "remedy"),
    [
        ((MAJOR + 1, 0), "Upgrade quire, or install an older stranger"),
        ((MAJOR, MINOR + 1), "Upgrade quire, or install an older stranger"),
        ((MAJOR - 1, 99), "Upgrade stranger, or install an older quire"),
    ],
)
def test_load_plugins_refuses_another_major_and_a_newer_minor_api_version(
    installed: Installed, declared: tuple[int, int], remedy: str
) -> None:
    installed.plugin("mine", "stranger", QUIRE_API_VERSION=declared)

    assert refused() == (
        f"plugin 'mine' of stranger 1.0 was written for API {declared[0]}.{declared[1]} of Quire; "
        f"this is API {MAJOR}.{MINOR}. {remedy}, or start without it: --disable-plugin mine."
    )


def test_load_plugins_accepts_an_older_minor_api_version(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire.hooks.loading.API_VERSION", (MAJOR, MINOR + 2))
    installed.plugin("mine", quire_attention_backends=returning([attention("a")]))

    assert load_plugins().names("attention") == ["a"]


def test_load_plugins_refuses_an_entry_point_name_of_two_distributions(
    installed: Installed,
) -> None:
    installed.plugin("mine", "alpha", version="1.1", quire_models=returning([]))
    installed.plugin("mine", "beta", version="2.2", quire_models=returning([]))

    assert refused() == (
        "two plugins are named 'mine': one of alpha 1.1 and one of beta 2.2. "
        "Uninstall one of them, or start without both: --disable-plugin mine."
    )


def test_load_plugins_takes_a_distribution_found_twice_once(installed: Installed) -> None:
    installed.plugin("mine", "My.Package", quire_attention_backends=returning([attention("a")]))
    installed.distribution("my-package", "0.9", mine="a_stale_module_that_is_gone")

    registry = load_plugins()

    assert registry.entry("attention", "a").owner.version == "1.0"


def test_load_plugins_refuses_a_module_behind_two_entry_points(installed: Installed) -> None:
    module = installed.plugin("one", quire_models=returning([]))
    installed.distribution("copy", two=module.__name__)

    message = refused()

    assert message.startswith("plugin 'two' of copy 1.0 names the same module as plugin 'one'")
    assert "--disable-plugin two" in message


def test_load_plugins_refuses_a_name_that_is_taken_and_names_both_owners(
    installed: Installed,
) -> None:
    installed.plugin("one", "alpha", quire_attention_backends=returning([attention("fast")]))
    installed.plugin("two", "beta", quire_attention_backends=returning([attention("fast")]))

    assert refused() == (
        "two plugins bring attention backend 'fast': plugin 'one' of alpha 1.0 and plugin 'two' of "
        "beta 1.0. Start without one of them: --disable-plugin one or --disable-plugin two."
    )


def test_load_plugins_refuses_a_name_that_one_plugin_brings_twice(installed: Installed) -> None:
    twice = [attention("fast"), attention("fast")]
    installed.plugin("one", "alpha", quire_attention_backends=returning(twice))

    assert refused().startswith("two plugins bring attention backend 'fast'")


def test_load_plugins_allows_one_name_in_two_kinds(installed: Installed) -> None:
    installed.plugin("one", quire_attention_backends=returning([attention("example")]))
    installed.plugin("two", quire_models=returning([model("example", "ExampleForCausalLM")]))

    assert [entry.kind for entry in load_plugins().entries()] == ["model", "attention"]


def test_load_plugins_refuses_an_unknown_hook_with_the_nearest(installed: Installed) -> None:
    installed.plugin("mine", "stranger", quire_attention_backend=returning([]))

    message = refused()

    assert message.startswith(
        "plugin 'mine' of stranger 1.0 implements a hook 'quire_attention_backend' that does not "
        "exist. Did you mean 'quire_attention_backends'?"
    )
    assert "--disable-plugin mine" in message


def test_load_plugins_refuses_a_hook_without_its_marker(installed: Installed) -> None:
    installed.plugin(
        "mine",
        "stranger",
        quire_models=returning([]),
        unmarked={"quire_samplers": returning([])},
    )

    assert refused().startswith(
        "plugin 'mine' of stranger 1.0 has a function 'quire_samplers' without @quire.hookimpl"
    )


def test_load_plugins_refuses_a_plugin_without_hooks(installed: Installed) -> None:
    installed.plugin("mine", "stranger")

    assert refused().startswith("plugin 'mine' of stranger 1.0 implements none of Quire's hooks")


def test_load_plugins_refuses_a_hook_with_a_wrong_argument(installed: Installed) -> None:
    def quire_models(config: object) -> list[object]:
        return []

    installed.plugin("mine", "stranger", quire_models=quire_models)

    assert refused().startswith(
        "plugin 'mine' of stranger 1.0 takes 'config' in 'quire_models'; the hook has no argument."
    )


def test_load_plugins_refuses_a_hook_wrapper(installed: Installed) -> None:
    from quire import hookimpl

    def quire_models() -> Any:
        return (yield)

    installed.plugin("mine", unmarked={"quire_models": hookimpl(wrapper=True)(quire_models)})

    assert "wraps the hook 'quire_models'; no hook of Quire can be wrapped" in refused()


@pytest.mark.parametrize(
    ("returned", "fact"),
    [
        (None, "returns None from 'quire_models' where a list of ModelPlugin is wanted"),
        ({}, "returns an object of type dict from 'quire_models' where a list of ModelPlugin"),
        (model("a", "A"), "returns an object of type ModelPlugin from 'quire_models' where a list"),
        (
            [model("a", "A"), "b"],
            "returns an object of type str from 'quire_models' as element 1, where ModelPlugin is",
        ),
        (
            [attention("a")],
            "returns an object of type AttentionPlugin from 'quire_models' as element 0, where",
        ),
    ],
)
def test_load_plugins_refuses_a_hook_that_returns_the_wrong_type(
    installed: Installed, returned: Any, fact: str
) -> None:
    installed.plugin("mine", "stranger", quire_models=returning(returned))

    message = refused()

    assert message.startswith(f"plugin 'mine' of stranger 1.0 {fact}")
    assert "--disable-plugin mine" in message


@pytest.mark.parametrize("error", [RuntimeError("no luck"), SystemExit("no luck")])
def test_load_plugins_refuses_a_hook_that_raises(
    installed: Installed, error: BaseException
) -> None:
    installed.plugin("mine", "stranger", quire_models=raising(error))

    assert refused().startswith(
        f"plugin 'mine' of stranger 1.0 fails in 'quire_models': {type(error).__name__}: no luck."
    )


@pytest.mark.parametrize(
    ("kind", "values", "fact"),
    [
        (attention, {"name": "Upper"}, "plugin name 'Upper' is not allowed"),
        (attention, {"name": "a", "load": "no-colon"}, "load='no-colon' does not name a class"),
        (attention, {"name": "a", "priority": {"cuda": "high"}}, "priority={'cuda': 'high'}"),
        (attention, {"name": "a", "priority": 3}, "priority=3 does not map devices"),
        (attention, {"name": "a", "options": {"k": 1}}, "options={'k': 1} does not map names"),
        (attention, {"name": "a", "summary": "a\nb"}, "summary='a\\nb' is not allowed"),
        (attention, {"name": "a", "why_unusable": "no"}, "why_unusable='no' cannot be called"),
        (model, {"name": "a", "priority": 0.5}, "priority=0.5 is not a whole number"),
        (
            QuantizationPlugin,
            {"name": "a", "load": "m:C", "formats": "fp8"},
            "formats='fp8' is not a tuple of names",
        ),
    ],
)
def test_load_plugins_refuses_a_descriptor_with_a_bad_field(
    installed: Installed, kind: Any, values: dict[str, Any], fact: str
) -> None:
    installed.plugin("mine", "stranger", quire_models=lambda: [kind(**values)])

    message = refused()

    assert message.startswith("plugin 'mine' of stranger 1.0 fails in 'quire_models': PluginError:")
    assert fact in message


def test_load_plugins_refuses_a_why_unusable_that_raises(installed: Installed) -> None:
    broken = attention("fast", why_unusable=raising(OSError("no driver")))
    installed.plugin("mine", "stranger", quire_attention_backends=returning([broken]))

    assert refused().startswith(
        "plugin 'mine' of stranger 1.0 fails in why_unusable() of 'fast': OSError: no driver."
    )


@pytest.mark.parametrize("answer", [True, False, "", 3])
def test_load_plugins_refuses_a_why_unusable_that_answers_neither_none_nor_a_sentence(
    installed: Installed, answer: Any
) -> None:
    broken = attention("fast", why_unusable=returning(answer))
    installed.plugin("mine", "stranger", quire_attention_backends=returning([broken]))

    assert f"returns {answer!r} from why_unusable() of 'fast'" in refused()
