"""Classes of Transformers on Quire's paged attention: the same tokens, or refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from generic_models import outcome, start
from tiny_models import ARCHITECTURES, make_model

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*tokenizer.json. no such file")
OUTCOMES = ("equal", "refused", "not tried")
DOCS = Path(__file__).parents[2] / "docs/models.md"

# One of each kind that test_transformers_equality.py has not: older names of experts, values
# narrower than keys, two calls a layer, tokens looked up behind the embedding, a head with a tied
# bias, linear layers asked for a dtype.
SERVED = (
    *("PhimoeForCausalLM", "DeepseekV3ForCausalLM", "DiffLlamaForCausalLM"),
    *("Gemma4ForCausalLM", "BertLMHeadModel", "HunYuanMoEV1ForCausalLM"),
)
REFUSED = {
    "BartForCausalLM": "sees other tokens than through attention",
    "DoryForCausalLM": "cannot go on with a cache of its own",
    "FalconForCausalLM": "forms of attention of its own",
    "InklingForCausalLM": "'position_bias', which is not passed on",
    "Llama4ForCausalLM": "a mask other than of all earlier tokens",
    "MambaForCausalLM": "without attention, as Mamba and RWKV",
    "MoshiForCausalLM": "sliding_window of 6 that only the cache of Transformers keeps to",
    "Qwen3_5ForCausalLM": "has 2 layers, of which 1 call",
    "RobertaForCausalLM": "counts positions otherwise",
}


@pytest.mark.parametrize("architecture", SERVED)
def test_a_class_of_each_kind_gives_the_tokens_of_generate(
    architecture: str, tmp_path: Path
) -> None:
    assert outcome(architecture, tmp_path) == "equal"


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_would_give_other_tokens_is_refused(architecture: str, tmp_path: Path) -> None:
    found = outcome(architecture, tmp_path)

    assert found.startswith("refused: ")
    assert REFUSED[architecture] in found


def test_experts_with_a_gate_of_their_own_are_never_packed(tmp_path: Path) -> None:
    """What multiplies them knows no scales."""
    make_model("BeamForCausalLM").save_pretrained(tmp_path)

    net = start(tmp_path, quantization="fp8").engine.runner.model.net

    kept = [m.layer for m in net.modules() if type(m).__name__ == "BeamExperts"]
    assert {layer.get_weight("gate_up_weight").dtype for layer in kept} == {torch.float32}


def documented() -> dict[str, str]:
    """Return what docs/models.md says of each class."""
    lines = DOCS.read_text("utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    rows = [row for row in rows if len(row) == 5 and row[1] in OUTCOMES]
    return {name: row[1] for row in rows for name in row[3].split(", ")}


def test_documentation_names_every_class() -> None:
    known = {name.removesuffix("ForCausalLM") for name in ARCHITECTURES}

    assert set(documented()) == known


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_class_does_what_the_documentation_says(architecture: str, tmp_path: Path) -> None:
    said = documented()[architecture.removesuffix("ForCausalLM")]
    if said == "not tried":
        pytest.skip("no tiny configuration of it")

    found = outcome(architecture, tmp_path)

    assert found.partition(":")[0] == said
