"""`quire plugins check` runs the kit on an installed backend and says what is wrong."""

from __future__ import annotations

import json

import pytest
import torch
import transformers  # noqa: F401 - it looks at what is installed, which is hidden below
from fake_distributions import Installed, attention, returning
from small_decoder import SmallConfig

from quire.cli.main import main
from quire.interfaces.plugin import (
    CheckpointPlugin,
    LogitsProcessorPlugin,
    ModelPlugin,
    QuantizationPlugin,
    SamplerPlugin,
)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Install plugins of every kind: right ones, broken ones, one that does not work here."""
    found = Installed(monkeypatch)
    backends = [
        attention("right", load="gather_attention:GatherAttention"),
        attention("wrong", load="broken_backends:WindowOneTooLong"),
        attention("elsewhere", why_unusable=returning("it needs a GPU")),
        attention("twice", load="gather_attention:GatherAttention"),
    ]
    found.plugin("backends", "alpha", quire_attention_backends=returning(backends))
    models = [
        ModelPlugin(
            name=name,
            load=load,
            architectures=("StrangeForCausalLM",),
            config_class=SmallConfig,
        )
        for name, load in (
            ("small", "small_decoder:SmallDecoder"),
            ("eps-fixed", "broken_models:EpsFixed"),
        )
    ]
    found.plugin("models", "beta", quire_models=returning(models))
    methods = [
        QuantizationPlugin(name="packed", load="int8_weights:Packed", formats=("packed",)),
        QuantizationPlugin(name="bias-forgotten", load="broken_methods:BiasForgottenMethod"),
    ]
    found.plugin("methods", "gamma", quire_quantization_methods=returning(methods))
    samplers = [
        SamplerPlugin(name="twice", load="plain_sampler:PlainSampler"),
        SamplerPlugin(name="narrow", load="broken_samplers:Int32Tokens"),
    ]
    found.plugin("samplers", "delta", quire_samplers=returning(samplers))
    processors = [
        LogitsProcessorPlugin(name="no-repeat", load="broken_processors:NoRepeat"),
        LogitsProcessorPlugin(name="never-forgets", load="broken_processors:NeverForgets"),
    ]
    found.plugin("processors", "epsilon", quire_logits_processors=returning(processors))
    checkpoints = [CheckpointPlugin(name="weights", load="quire:nothing")]
    found.plugin("checkpoints", "zeta", quire_checkpoints=returning(checkpoints))
    return found


def test_right_backend_ends_with_0_and_a_line_a_check(
    installed: Installed, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugins", "check", "right"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("output             passed")
    assert any("encoder            skipped: it has no latent attention" in line for line in lines)
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
        (["weights"], "'weights' is a bundled checkpoint, which the kit does not check"),
        (["wright"], "unknown plugin 'wright'; installed: bias-forgotten, elsewhere, eps-fixed"),
        (["wright"], "Did you mean 'right'?"),
        (["twice"], "several kinds have a plugin 'twice': attention, sampler. Say which: --kind"),
        (["twice", "--kind", "models"], "--kind is 'models'; allowed: attention, quantization"),
        (["twice", "--kind", "model"], "unknown model implementation 'twice'"),
        (["right", "--ops"], "the plugin 'right' and --ops are both given"),
        (["--ops", "no.such"], "--ops no.such: it cannot be imported: No module named 'no'."),
        (["elsewhere"], "it needs a GPU."),
        (["right", "--profile", "slow"], "argument --profile: invalid choice: 'slow'"),
        (["right", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        ([], "the following arguments are required: NAME, or --ops instead of it."),
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


@pytest.mark.parametrize(
    ("arguments", "check"),
    [
        (["packed"], "product            passed"),
        (["twice", "--kind", "sampler"], "draws              passed"),
        (["no-repeat"], "forgets            passed"),
        (["small"], "logits             skipped: transformers has no class StrangeForCausalLM"),
        (["small"], "weights used       passed"),
        (["--ops"], "rms_norm           passed"),
        (["--ops"], "fuses_norm         skipped: the kit has no formula for it"),
    ],
)
def test_right_plugin_of_every_kind_ends_with_0(
    installed: Installed, capsys: pytest.CaptureFixture[str], arguments: list[str], check: str
) -> None:
    assert main(["plugins", "check", *arguments]) == 0

    out = capsys.readouterr().out
    assert check in out
    assert ": passed (quick on cpu, seed 0; " in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("bias-forgotten", "quantization", "guess: the bias is not added"),
        ("narrow", "sampler", "token_ids is torch.int32"),
        ("never-forgets", "logits-processor", "after remove_row"),
        ("eps-fixed", "model", "guess: a key is declared and not honoured"),
    ],
)
def test_broken_plugin_of_every_kind_ends_with_1(
    installed: Installed, capsys: pytest.CaptureFixture[str], name: str, kind: str, says: str
) -> None:
    assert main(["plugins", "check", name, "--json"]) == 1

    report = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["name"]) == (kind, name)
    failed = [check["detail"] for check in report["checks"] if check["outcome"] == "failed"]
    assert any(says in detail for detail in failed)
