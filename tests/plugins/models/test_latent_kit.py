"""Faults of latent attention, of experts in groups and of gpt-oss that the model kit catches."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor

from quire.layers.latent_attention import LatentAttention
from quire.layers.rotary import RotaryTable
from quire.testing import check_model
from quire.testing.kit_report import PROFILES
from quire.testing.model_cases import ModelSubject
from quire_models.decoder import LayerOptions
from quire_models.decoder_config import DecoderConfig
from quire_models.deepseek import DeepseekV2Config, DeepseekV3Config
from quire_models.deepseek.model import DeepseekV2, DeepseekV3
from quire_models.gpt_oss import GptOssConfig
from quire_models.gpt_oss.model import BiasedExperts, GptOss
from quire_models.mixture import GroupRouter, Mixture

PATIENT = evolve(PROFILES["quick"], seconds=60, examples=40, longest=20, least=4)


def in_groups(options: LayerOptions, **changes: Any) -> LayerOptions:
    """Return the options of a layer with another choice of experts."""
    if options.mixture is None or options.mixture.groups is None:
        return options
    groups = evolve(options.mixture.groups, **changes)
    return evolve(options, mixture=evolve(options.mixture, groups=groups))


class Halves(DeepseekV2):
    """Rotates halves of a head where pairs are meant."""

    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        return evolve(DeepseekV2.layer_options(config, index), rotary_table=RotaryTable)


class WithoutMscale(DeepseekV3):
    """Scales by the head alone, whatever YaRN says."""

    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        options = DeepseekV3.layer_options(config, index)
        assert options.latent is not None
        sizes = options.latent
        scale = (sizes.qk_nope_head_dim + sizes.qk_rope_head_dim) ** -0.5
        return evolve(options, latent=evolve(sizes, scale=scale))


class AllGroups(DeepseekV3):
    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        options = DeepseekV3.layer_options(config, index)
        return in_groups(options, num_groups=1, top_groups=1)


class Unscaled(DeepseekV3):
    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        return in_groups(DeepseekV3.layer_options(config, index), scale=1.0)


class AlwaysSparse(DeepseekV2):
    """Does not look at first_k_dense_replace."""

    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        assert isinstance(config, DeepseekV2Config)
        return DeepseekV2.layer_options(evolve(config, first_k_dense_replace=0), index)


class Changed(DeepseekV3):
    """Changes a part once it is made."""

    part: type = object

    def __init__(self, config: Any, build: Any) -> None:
        super().__init__(config, build)
        for module in self.modules():
            if isinstance(module, self.part):
                self.change(module)

    def change(self, module: Any) -> None:
        raise NotImplementedError


class ChoiceWithoutBias(Changed):
    part = GroupRouter

    def change(self, module: Any) -> None:
        forward = module.forward

        def without(x: Tensor) -> Any:
            kept, module.e_score_correction_bias = module.e_score_correction_bias, None
            found = forward(x)
            module.e_score_correction_bias = kept
            return found

        module.forward = without


class WithoutSharedExperts(Changed):
    part = Mixture

    def change(self, module: Any) -> None:
        module.shared_expert.forward = lambda x: torch.zeros_like(x)


class WithoutLatentNorm(Changed):
    part = LatentAttention

    def change(self, module: Any) -> None:
        rotate, rank = module.rotary.rotate, module.latent.kv_lora_rank

        def key(kv: Tensor, positions: Tensor) -> Tensor:
            turned = rotate(kv[:, None, rank:], positions)[:, 0]
            return torch.cat((kv[:, :rank], turned), -1)

        module._key = key


class KeysNotRotated(Changed):
    part = LatentAttention

    def change(self, module: Any) -> None:
        key, rank = module._key, module.latent.kv_lora_rank
        module._key = lambda kv, at: torch.cat((key(kv, at)[:, :rank], kv[:, rank:]), -1)


class ValuesOfTheNextHead(Changed):
    part = LatentAttention

    def change(self, module: Any) -> None:
        parts = module._parts_of_heads
        module._parts_of_heads = lambda: (parts()[0], parts()[1].roll(1, 0))


class OtherWindows(GptOss):
    """Has the windows in the other layers."""

    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        assert isinstance(config, GptOssConfig)
        types = ("full_attention", "sliding_attention") * config.num_hidden_layers
        other = evolve(config, layer_types=types[: config.num_hidden_layers])
        return GptOss.layer_options(other, index)


class WithoutSinks(GptOss):
    def __init__(self, config: Any, build: Any) -> None:
        super().__init__(config, build)
        for layer in self.model.layers:
            attention = layer.self_attn.attn
            forward = attention.forward

            def without(*given: Any, own: Any = attention, run: Any = forward) -> Tensor:
                kept, own._parameters["sinks"] = own.sinks, torch.full_like(own.sinks, -1e9)
                found = run(*given)
                own._parameters["sinks"] = kept
                return found

            attention.forward = without


class ChangedExperts(GptOss):
    def __init__(self, config: Any, build: Any) -> None:
        super().__init__(config, build)
        for module in self.modules():
            if isinstance(module, BiasedExperts):
                self.change(module)

    def change(self, module: BiasedExperts) -> None:
        module.limit = 1e9


class HalvesOfGates(ChangedExperts):
    def change(self, module: BiasedExperts) -> None:
        forward = module.forward

        def halves(*given: Tensor) -> Tensor:
            kept = module.gate_up_proj.data, module.gate_up_proj_bias.data
            for weight in (module.gate_up_proj, module.gate_up_proj_bias):
                weight.data = torch.stack(weight.data.chunk(2, -1), -1).flatten(-2)
            found = forward(*given)
            module.gate_up_proj.data, module.gate_up_proj_bias.data = kept
            return found

        module.forward = halves  # type: ignore[method-assign]


YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.5}
CONFIGS = {
    "no limit": {"swiglu_limit": 0.05},
    "other windows": {"sliding_window": 3},
    "no mscale": {"rope_parameters": YARN},
}
FAULTS: dict[str, tuple[type, type, str, str]] = {
    "halves rotated": (Halves, DeepseekV2Config, "DeepseekV2", r"logits: .*"),
    "no mscale": (WithoutMscale, DeepseekV3Config, "DeepseekV3", "logits: .*"),
    "all groups": (AllGroups, DeepseekV3Config, "DeepseekV3", "experts of all groups"),
    "unscaled": (Unscaled, DeepseekV3Config, "DeepseekV3", "routed_scaling_factor"),
    "always sparse": (AlwaysSparse, DeepseekV2Config, "DeepseekV2", "is wanted, and the real"),
    "no bias": (ChoiceWithoutBias, DeepseekV3Config, "DeepseekV3", "bias of the choice"),
    "no shared experts": (
        WithoutSharedExperts,
        DeepseekV3Config,
        "DeepseekV3",
        r"shared_expert.* may be anything|logit",
    ),
    "no latent norm": (WithoutLatentNorm, DeepseekV3Config, "DeepseekV3", "latents' norm"),
    "keys not rotated": (KeysNotRotated, DeepseekV3Config, "DeepseekV3", "logits: .*"),
    "other heads": (ValuesOfTheNextHead, DeepseekV3Config, "DeepseekV3", "logits: .*"),
    "other windows": (OtherWindows, GptOssConfig, "GptOss", "logits: .*"),
    "no sinks": (WithoutSinks, GptOssConfig, "GptOss", "sinks are ignored"),
    "no limit": (ChangedExperts, GptOssConfig, "GptOss", "limit of the experts' gates"),
    "halves of gates": (HalvesOfGates, GptOssConfig, "GptOss", "as halves, not in turns"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(name: str) -> None:
    model, config_class, family, says = FAULTS[name]
    subject = ModelSubject(
        model=model,
        config_class=config_class,
        architecture=f"{family}ForCausalLM",
        config=CONFIGS.get(name, {}),
    )

    report = check_model(subject, profile=PATIENT)

    failed = [check for check in report.checks if check.outcome == "failed"]
    assert len(failed) == 1, "it passed"
    assert re.search(says, f"{failed[0].name}: {failed[0].detail}"), failed[0].detail
