"""`quire plugins` lists what is installed, or shows why it cannot be loaded."""

from __future__ import annotations

import json

import pytest
from fake_distributions import Installed, attention, model, returning

from quire.cli.main import main


@pytest.fixture
def two_plugins(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Install a model, and an attention backend that does not work here."""
    installed = Installed(monkeypatch)
    broken = attention("fast", why_unusable=returning("it needs a GPU"), summary="One pass")
    installed.plugin("attention-fast", "alpha", quire_attention_backends=returning([broken]))
    models = [model("plain", "PlainForCausalLM", summary="A decoder")]
    installed.plugin("models-plain", "beta", version="2.1", quire_models=returning(models))
    return installed


ROW = {
    "kind": "attention",
    "name": "fast",
    "plugin": "attention-fast",
    "distribution": "alpha",
    "version": "1.0",
    "api_version": "1.0",
    "usable": False,
    "why_unusable": "it needs a GPU",
    "built": True,
    "summary": "One pass",
}


def test_plugins_json_says_everything(
    two_plugins: Installed, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugins", "--json"]) == 0

    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["plain", "fast"]
    assert rows[1] == ROW


def test_plugins_table_has_one_line_a_plugin(
    two_plugins: Installed, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugins"]) == 0

    header, plain, fast = capsys.readouterr().out.splitlines()
    assert header.split() == [
        *("kind", "name", "plugin", "distribution", "version", "api", "version"),
        *("usable", "summary"),
    ]
    assert plain.split() == [
        *("model", "plain", "models-plain", "beta", "2.1", "1.0", "yes", "A", "decoder"),
    ]
    assert "it needs a GPU  One pass" in fast


def test_plugins_architectures_are_listed_with_who_builds_them(
    two_plugins: Installed, capsys: pytest.CaptureFixture[str]
) -> None:
    best = [model("better", "PlainForCausalLM", priority=5), model("other", "OtherForCausalLM")]
    two_plugins.plugin("models-better", "gamma", quire_models=returning(best))

    assert main(["plugins", "--architectures"]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert lines == [["OtherForCausalLM", "other"], ["PlainForCausalLM", "better, plain"]]

    assert main(["plugins", "--architectures", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"OtherForCausalLM": ["other"], "PlainForCausalLM": ["better", "plain"]}


def test_plugins_kind_shows_only_that_kind(
    two_plugins: Installed, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugins", "--kind", "attention", "--json"]) == 0

    assert json.loads(capsys.readouterr().out) == [ROW]


def test_plugins_disable_plugin_hides_it(
    two_plugins: Installed, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugins", "--disable-plugin", "models-plain", "--json"]) == 0

    assert json.loads(capsys.readouterr().out) == [ROW]


def test_plugins_shows_the_error_of_a_broken_plugin(
    two_plugins: Installed, capsys: pytest.CaptureFixture[str]
) -> None:
    two_plugins.distribution("gamma", broken="a_module_that_is_not_there")

    assert main(["plugins"]) == 2

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("quire: error: plugin 'broken' of gamma 1.0 cannot be imported")
    assert captured.err.endswith("--disable-plugin broken.\n")


def test_plugins_table_says_what_is_not_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unbuilt = attention("fast", build="a:b", is_built=returning(False))
    Installed(monkeypatch).plugin("fast", quire_attention_backends=returning([unbuilt]))

    assert main(["plugins"]) == 0

    assert "not built; run `quire build fast`" in capsys.readouterr().out
