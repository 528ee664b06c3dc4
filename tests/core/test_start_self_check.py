"""A start compares its attention backend with float64, and refuses to serve with a wrong one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
from tiny_llama import make_engine, prompt, request, run_all
from torch import Tensor

from quire.cli.main import main
from quire.errors import KernelError
from quire_attention.reference.backend import ReferenceAttention
from quire_attention.sdpa.backend import SdpaAttention


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def wrong_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break the chosen backend where sequences have several tokens."""
    right = SdpaAttention._attend_alone

    def wrong(self: Any, layer: Any, q: Tensor, *rest: Any) -> None:
        right(self, layer, q * 1.01, *rest)

    monkeypatch.setattr(SdpaAttention, "_attend_alone", wrong)


def test_start_tells_how_long_the_check_took(folder: Path) -> None:
    engine = make_engine(folder)

    took = engine.prepared.phases.seconds["self-check"]
    print(f"self-check of {engine.selections[2].used}: {1e3 * took:.1f} ms")
    assert 0 < took < 1.0
    assert engine.layout.self_check == ["attention sdpa (2 layers): against float64 at the start"]


def test_start_with_a_wrong_backend_is_refused(folder: Path, wrong_sdpa: None) -> None:
    with pytest.raises(KernelError, match="backend 'sdpa' fails the self-check: it is wrong at"):
        make_engine(folder)


def test_start_names_both_of_two_backends(folder: Path, wrong_sdpa: None) -> None:
    with pytest.raises(KernelError, match="'prefill=sdpa,decode=reference' fails .* new tokens af"):
        make_engine(folder, attention_backend="prefill=sdpa,decode=reference")


def test_start_needs_no_reference_plugin(
    folder: Path, wrong_sdpa: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(ReferenceAttention, "attend")

    with pytest.raises(KernelError, match="backend 'sdpa' fails the self-check"):
        make_engine(folder, disable_plugin=("attention-reference",))


def test_skipped_check_lets_a_wrong_backend_start(folder: Path, wrong_sdpa: None) -> None:
    engine = make_engine(folder, skip_self_check=True)

    assert "self-check" not in engine.prepared.phases.seconds
    tokens, _ = run_all(engine, [request(0, prompt(0, 9))])
    assert len(tokens["r0", 0]) > 0


@pytest.mark.parametrize(
    ("options", "verdict"),
    [([], "against float64 at the start"), (["--skip-self-check"], "skipped: --skip-self-check")],
)
def test_explain_says_whether_it_is_checked(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], verdict: str
) -> None:
    common = ["explain", str(folder), "--skip-tokenizer-init", "--attention-backend", "sdpa"]
    assert main([*common, *options]) == 0
    text = capsys.readouterr().out
    assert main([*common, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    assert f"\nself-check\n  attention sdpa (2 layers): {verdict}\n" in text
    assert found["self_check"] == [f"attention sdpa (2 layers): {verdict}"]
