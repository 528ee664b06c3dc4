"""`quire plugins check` runs the kit on an installed backend and says what is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from fake_distributions import Installed, attention, model, returning

from quire.cli.main import main


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Install a right backend, a broken one, one that does not work here, and a model."""
    found = Installed(monkeypatch)
    backends = [
        attention("right", load="gather_attention:GatherAttention"),
        attention("wrong", load="broken_backends:WindowOneTooLong"),
        attention("elsewhere", why_unusable=returning("it needs a GPU")),
    ]
    found.plugin("backends", "alpha", quire_attention_backends=returning(backends))
    models = [model("plain", "PlainForCausalLM")]
    found.plugin("models", "beta", quire_models=returning(models))
    return found


def test_right_backend_ends_with_0_and_a_line_a_check(
    installed: Installed, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugins", "check", "right"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("output             passed")
    assert "encoder            skipped: it has no latent attention" in lines[-2]
    assert any("batches came out bit-equal" in line for line in lines)
    assert lines[-1].startswith("right: passed (quick on cpu, seed 0; ")


def test_broken_backend_ends_with_1_and_its_diagnosis(
    installed: Installed, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugins", "check", "wrong"]) == 1

    out = capsys.readouterr().out
    assert "case: sequences of " in out
    assert "guess: the window is one token too long (off by one)" in out
    assert "seed: 0" in out


@pytest.mark.parametrize("arguments", [["check", "wrong", "--json"], ["--json", "check", "wrong"]])
def test_json_is_one_object(
    installed: Installed, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(["plugins", *arguments]) == 1

    report = json.loads(capsys.readouterr().out)
    assert (report["name"], report["passed"], report["seed"]) == ("wrong", False, 0)
    outcomes = {check["name"]: check["outcome"] for check in report["checks"]}
    assert outcomes["output"] == "failed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_device_that_is_not_there_ends_with_2(
    installed: Installed, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugins", "check", "right", "--device", "cuda"]) == 2

    assert "PyTorch finds no CUDA device here. Use --device cpu." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["plain"], "'plain' is a model implementation; this version checks attention backends"),
        (["wright"], "Did you mean 'right'?"),
        (["elsewhere"], "it needs a GPU."),
        (["right", "--profile", "slow"], "argument --profile: invalid choice: 'slow'"),
        (["right", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        ([], "the following arguments are required: NAME"),
    ],
)
def test_bad_usage_ends_with_2_and_one_line(
    installed: Installed,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    fact: str,
) -> None:
    assert main(["plugins", "check", *arguments]) == 2

    err = capsys.readouterr().err
    assert fact in err
    assert err.count("\n") == 1
