"""One plugin module that offers a fake of every kind, as a stranger's package would."""

from __future__ import annotations

from fake_model import FakeConfig

from quire import hookimpl
from quire.interfaces.plugin import (
    AttentionPlugin,
    LogitsProcessorPlugin,
    ModelPlugin,
    PluginOption,
    QuantizationPlugin,
    SamplerPlugin,
)


def parse_yes(text: str) -> bool:
    """Take yes or no."""
    if text not in ("yes", "no"):
        raise ValueError(f"{text!r} is neither yes nor no")
    return text == "yes"


@hookimpl
def quire_attention_backends() -> list[AttentionPlugin]:
    """Offer `fake`, first on CPUs."""
    fuse = PluginOption(meaning="fuse the write", default=False, parse=parse_yes)
    return [
        AttentionPlugin(
            name="fake",
            load="fake_attention:FakeAttention",
            priority={"cpu": 1000},
            options={"fuse": fuse},
            summary="the oracle in disguise",
            why_unusable=lambda: None,
        )
    ]


@hookimpl
def quire_quantization_methods() -> list[QuantizationPlugin]:
    """Offer `fake-int4` for checkpoints that say so."""
    return [
        QuantizationPlugin(
            name="fake-int4",
            load="fake_quantization:FakeQuantization",
            formats=("fake-packed",),
            priority=3,
            on_the_fly=False,
        )
    ]


@hookimpl
def quire_models() -> list[ModelPlugin]:
    """Claim FakeForCausalLM."""
    return [
        ModelPlugin(
            name="fake-model",
            load="fake_model:FakeModel",
            architectures=("FakeForCausalLM",),
            config_class=FakeConfig,
            priority=7,
        )
    ]


@hookimpl
def quire_samplers() -> list[SamplerPlugin]:
    """Offer `fake-sampler`, first on CPUs."""
    return [
        SamplerPlugin(name="fake-sampler", load="fake_sampling:FakeSampler", priority={"cpu": 1000})
    ]


@hookimpl
def quire_logits_processors() -> list[LogitsProcessorPlugin]:
    """Offer both processors."""
    return [
        LogitsProcessorPlugin(name="fake-history", load="fake_sampling:HistoryProcessor"),
        LogitsProcessorPlugin(name="fake-host", load="fake_sampling:HostProcessor"),
    ]
