"""MODEL is a folder, a bundled name or a Hugging Face id, and mistakes are told in one line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from quire.errors import ConfigError
from quire.execution.model_folder import architectures, find_folder, find_quantization, read_config


def find(model: str, bundled: dict[str, Path] | None = None, **wanted: bool) -> Path:
    bundled = bundled or {}
    return find_folder(
        model,
        revision=None,
        bundled=bundled,
        open_bundled=bundled.__getitem__,
        **wanted,
    )


def refusal(model: str, bundled: dict[str, Path] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        find(model, bundled)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def test_folder_that_exists_is_taken_before_a_bundled_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)

    assert find("demo", {"demo": Path("/elsewhere")}) == Path("demo")


def test_bundled_name_opens_the_bundled_folder(tmp_path: Path) -> None:
    assert find("demo", {"demo": tmp_path}) == tmp_path


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    assert find("~") == tmp_path


def test_unknown_name_lists_what_is_bundled_and_the_nearest() -> None:
    message = refusal("dem0", {"demo": Path("/x"), "other": Path("/y")})

    assert "bundled: demo, other" in message
    assert "Did you mean 'demo'?" in message


def test_missing_folder_says_so() -> None:
    assert "no such folder" in refusal("/nonexistent/model")


def test_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("x")

    assert f"{file} is a file" in refusal(str(file))


@pytest.mark.parametrize(
    "model", ["~nobody-of-that-name/model", "a" * 5000, "x\0y", "a/" * 3000, "\n\n"]
)
def test_impossible_path_is_refused_like_a_missing_one(model: str) -> None:
    assert "no such folder" in refusal(model)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_folder_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    tmp_path.chmod(0)
    try:
        assert "no such folder" in refusal(str(tmp_path / "m"))
    finally:
        tmp_path.chmod(0o700)


def test_hub_id_that_cannot_be_had_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(model: str, **options: object) -> str:
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)

    message = refusal("owner/name")

    assert "ConnectionError: no route to host" in message
    assert "second line" not in message


def test_hub_id_in_the_cache_is_taken_without_the_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    asked = []

    def local(model: str, *, local_files_only: bool = False, **options: object) -> str:
        asked.append((model, local_files_only))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", local)
    (tmp_path / "model.safetensors").write_text("")

    assert find("owner/name") == tmp_path
    assert asked == [("owner/name", True)]


def test_weights_are_downloaded_only_where_they_are_wanted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    asked = []

    def download(
        model: str, *, allow_patterns: list[str], local_files_only: bool = False, **_: object
    ) -> str:
        asked.append((local_files_only, "*.safetensors" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    assert find("owner/name", with_weights=False) == tmp_path
    assert asked == [(True, False)]
    # What is in the cache now has no weights, so that the network is asked for them.
    assert find("owner/name") == tmp_path
    assert asked[1:] == [(True, True), (False, True)]


@pytest.mark.parametrize(("auto_map", "asks_again"), [('"auto_map": {}', True), ("", False)])
def test_code_is_downloaded_where_it_is_wanted_and_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, auto_map: str, asks_again: bool
) -> None:
    import huggingface_hub

    asked = []

    def download(
        model: str, *, allow_patterns: list[str], local_files_only: bool = False, **_: object
    ) -> str:
        asked.append((local_files_only, "*.py" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "config.json").write_text(f"{{{auto_map}}}")
    (tmp_path / "model.safetensors").touch()

    assert find("owner/name") == find("owner/name", with_code=True) == tmp_path

    assert asked == [(True, False), (True, True), *[(False, True)] * asks_again]


def test_ids_are_modelscopes_where_that_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QUIRE_USE_MODELSCOPE", "1")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    assert "`pip install modelscope` brings it" in refusal("owner/name")

    hub = SimpleNamespace(snapshot_download=lambda model, **_: str(tmp_path / model))
    monkeypatch.setitem(sys.modules, "modelscope", hub)
    (tmp_path / "owner/name").mkdir(parents=True)
    (tmp_path / "owner/name/model.safetensors").write_text("")
    assert find("owner/name") == tmp_path / "owner/name"

    monkeypatch.setenv("QUIRE_USE_MODELSCOPE", "please")
    assert "QUIRE_USE_MODELSCOPE is 'please'; allowed: 1, true, 0, false" in refusal("owner/name")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{not json", "not readable as JSON"),
        (b"", "not readable as JSON"),
        (b"\xff\xfe\x00", "not readable as JSON"),
        (b"[" * 200_000, "not readable as JSON"),
        (b"[1]", "holds a list"),
        (b"null", "holds a NoneType"),
        (b'"text"', "holds a str"),
        (b"1" * 5000, "not readable as JSON"),
    ],
    ids=range(8),
)
def test_config_that_is_no_object_is_refused_by_name(
    tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "config.json").write_bytes(content)

    with pytest.raises(ConfigError, match=words) as caught:
        read_config(tmp_path)

    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("hf_quant_config.json", "modelopt"),
        ("quantize_config.json", "gptq"),
        ("quant_config.json", "awq"),
    ],
)
def test_quantization_beside_config_is_found(tmp_path: Path, name: str, method: str) -> None:
    (tmp_path / name).write_text('{"bits": 4}')

    config, path = find_quantization({"a": 1}, tmp_path)

    assert config == {"a": 1, "quantization_config": {"quant_method": method, "bits": 4}}
    assert path == tmp_path / name


def test_quantization_of_config_comes_before_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text('{"bits": 4}')
    own = {"quantization_config": {"quant_method": "awq"}}

    assert find_quantization(own, tmp_path) == (own, tmp_path / "config.json")


def test_quantization_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "hf_quant_config.json").write_text("{")

    with pytest.raises(ConfigError, match=r"hf_quant_config\.json: not readable as JSON"):
        find_quantization({}, tmp_path)


def test_folder_without_config_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        read_config(tmp_path)


def test_config_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()

    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "value", [None, [], "LlamaForCausalLM", [5], [""], {}, [None], ["x" * 1000, 7]]
)
def test_config_without_an_architecture_is_refused_naming_the_key(value: object) -> None:
    with pytest.raises(ConfigError, match="'architectures'") as caught:
        architectures({"architectures": value}, Path("m/config.json"))

    assert "m/config.json" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_architectures_are_returned_in_order() -> None:
    assert architectures({"architectures": ["B", "A"]}, Path("x")) == ["B", "A"]
