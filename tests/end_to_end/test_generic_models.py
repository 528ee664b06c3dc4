"""Classes of Transformers on Quire's paged attention: the same tokens, or refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from generic_models import outcome
from tiny_models import ARCHITECTURES

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*tokenizer.json. no such file")
OUTCOMES = ("equal", "refused", "not tried")
DOCS = Path(__file__).parents[2] / "docs/models.md"

# One of each kind: experts of three layouts, sinks, values narrower than keys, two calls a layer,
# tokens looked up behind the embedding, a head with a tied bias, Linear layers asked for a dtype.
SERVED = (
    *("OlmoeForCausalLM", "PhimoeForCausalLM", "GptOssForCausalLM", "GraniteMoeForCausalLM"),
    *("DeepseekV3ForCausalLM", "DiffLlamaForCausalLM", "Gemma4ForCausalLM", "BertLMHeadModel"),
    *("Exaone4ForCausalLM", "HunYuanMoEV1ForCausalLM"),
)
REFUSED = {
    "BartForCausalLM": "sees other tokens than through attention",
    "DoryForCausalLM": "cannot go on with a cache of its own",
    "FalconForCausalLM": "forms of attention of its own",
    "InklingForCausalLM": "'position_bias', which is not passed on",
    "Llama4ForCausalLM": "a mask other than of all earlier tokens",
    "MambaForCausalLM": "without attention, as Mamba and RWKV",
    "MoshiForCausalLM": "sliding_window of 6 that only the cache of Transformers keeps to",
    "MptForCausalLM": "computes with its mask by itself, as for ALiBi",
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
