"""Faults of mixtures that the model kit has to catch, and say what is wrong."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import pytest
from attrs import evolve
from torch import Tensor

from quire.interfaces.model import WeightNames
from quire.testing import check_model
from quire.testing.kit_report import PROFILES
from quire.testing.model_cases import ModelSubject
from quire_kernels import ops
from quire_models.decoder import LayerOptions
from quire_models.decoder_config import DecoderConfig
from quire_models.mixtral import MixtralConfig
from quire_models.mixtral.model import Mixtral
from quire_models.mixture import Mixture
from quire_models.norm import Norm
from quire_models.qwen2_moe import Qwen2MoeConfig
from quire_models.qwen2_moe.model import Qwen2Moe
from quire_models.qwen3_moe import Qwen3MoeConfig
from quire_models.qwen3_moe.model import Qwen3Moe

PATIENT = evolve(PROFILES["quick"], seconds=60, examples=40, longest=20, least=4)


def changed(options: LayerOptions, **changes: Any) -> LayerOptions:
    """Return the options of a layer with another mixture."""
    assert options.mixture is not None
    return evolve(options, mixture=evolve(options.mixture, **changes))


class Swapped(Mixtral):
    """Takes w1 for up and w3 for gate."""

    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        return changed(Mixtral.layer_options(config, index), parts=("w3", "w1", "w2"))


class NotNormalised(Mixtral):
    """Leaves the weights of a token's experts as the softmax gives them."""

    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        return changed(Mixtral.layer_options(config, index), normalised=False)


class AlwaysNormalised(Qwen3Moe):
    """Does not look at norm_topk_prob."""

    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        return changed(Qwen3Moe.layer_options(config, index), normalised=True)


class OneExpertFewer(Qwen3Moe):
    """Loads all experts but the last."""

    weight_names: ClassVar = WeightNames(
        renamed=Qwen3Moe.weight_names.renamed, ignored=(r".*\.experts\.3\..*",)
    )

    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        return changed(Qwen3Moe.layer_options(config, index), num_experts=3)


class WithoutSharedExpert(Qwen2Moe):
    """Loads the expert that serves every token, and leaves it out."""

    def __init__(self, config: Any, build: Any) -> None:
        super().__init__(config, build)
        for module in self.modules():
            if isinstance(module, Mixture):
                module.forward = lambda *given, own=module: chosen_alone(own, *given)  # type: ignore


def chosen_alone(own: Mixture, x: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Return what the chosen experts make, and the sum."""
    normed, total = norm.add(x, residual)
    weights, ids = ops.route(own.gate(normed), own.options.top_k, normalise=own.options.normalised)
    return own.experts(normed, weights, ids), total


class EverywhereSparse(Qwen2Moe):
    """Does not look at mlp_only_layers and decoder_sparse_step."""

    @staticmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        assert isinstance(config, Qwen2MoeConfig)
        dense = evolve(config, mlp_only_layers=(), decoder_sparse_step=1)
        return Qwen2Moe.layer_options(dense, index)


FAULTS: dict[str, tuple[type, type, str, str]] = {
    "gate and up": (Swapped, MixtralConfig, "Mixtral", "gate and up of the experts are swapped"),
    "not normalised": (NotNormalised, MixtralConfig, "Mixtral", "a token's experts are weighed"),
    "always normalised": (AlwaysNormalised, Qwen3MoeConfig, "Qwen3Moe", "experts are weighed"),
    "one expert unloaded": (OneExpertFewer, Qwen3MoeConfig, "Qwen3Moe", r"mlp\.gate\.weight \["),
    "no shared expert": (
        WithoutSharedExpert,
        Qwen2MoeConfig,
        "Qwen2Moe",
        r"shared_expert.* may be anything|logit",
    ),
    "layers without experts": (
        EverywhereSparse,
        Qwen2MoeConfig,
        "Qwen2Moe",
        r"mlp\.(experts|gate|shared).* is wanted, and the real class has no such tensor",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_a_mixture_is_caught(name: str) -> None:
    model, config_class, family, says = FAULTS[name]
    subject = ModelSubject(
        model=model,
        config_class=config_class,
        architecture=f"{family}ForCausalLM",
        config={"mlp_only_layers": [0]} if name == "layers without experts" else {},
    )

    report = check_model(subject, profile=PATIENT)

    failed = [check for check in report.checks if check.outcome == "failed"]
    assert len(failed) == 1, "it passed"
    assert re.search(says, failed[0].detail), failed[0].detail
