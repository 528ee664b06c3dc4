"""The walk through a model's blocks, and what can be folded in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
from small_model import write_model
from torch import Tensor, nn

from quire.config import EngineConfig
from quire.errors import ConfigError
from quire.execution import setup
from quire.interfaces.batch import Batch
from quire.interfaces.model import Model
from quire.preparation import prepare
from quire.quantize.batches import Attending, choose_groups, make_batches
from quire.quantize.blocks import Call, call_of, find_blocks
from quire.quantize.folding import Fold, find_folds
from quire.quantize.streaming import Streaming, Tensors, check_names, fill

SAMPLES = [tiny_llama.prompt(i, n) for i, n in enumerate((9, 1, 30, 5))]


class Walk:
    """A model whose blocks are loaded, and its batches."""

    def __init__(self, folder: Path, max_tokens: int = 32) -> None:
        options = {"model": str(folder), "attention_backend": "sdpa", "device": "cpu"}
        prepared = prepare(EngineConfig.from_options(options))
        streaming = Streaming(Tensors(prepared.checkpoint))
        classes = setup.ChosenClasses(
            model=prepared.model.load_class(),
            quantization=streaming,
            dense=streaming,
            sampler=None,
        )
        self.model: Model = setup.build_model(
            classes, prepared.model_config, dtype="float32", device="cpu", max_model_len=64
        )
        device = torch.device("cpu")
        groups, _ = choose_groups(prepared, self.model, device)
        self.batches = make_batches(SAMPLES, groups, max_tokens)
        lengths = [batch.query_lens for batch in self.batches]
        self.attending = Attending.of(self.model, groups, lengths)
        places = check_names(self.model, prepared.checkpoint)
        outside = ("model.embed_tokens.weight", "lm_head.weight")
        fill({n: p for n, p in places.items() if n not in outside}, prepared.checkpoint)
        self.name, self.blocks = find_blocks(self.model)
        for block in self.blocks:
            self.attending.bind(block)

    def run(self, call: Call, index: int, batch: Batch) -> Any:
        self.attending.plan(batch)
        return call.run(self.blocks[index])


@torch.inference_mode()
def test_blocks_that_run_one_by_one_give_what_the_model_gives(tmp_path: Path) -> None:
    walk = Walk(write_model(tmp_path / "plain"))
    assert walk.name == "model.layers"
    assert [batch.query_lens for batch in walk.batches] == [[1, 9], [30], [5]]
    for batch in walk.batches:
        previous: Any = None
        for index in range(len(walk.blocks)):
            call = call_of(walk.model, walk.blocks, index, batch, previous)
            previous = walk.run(call, index, batch)
        walk.attending.plan(batch)

        whole = walk.model(walk.model.embed(batch.token_ids), batch)

        added, residual = previous
        assert torch.equal(walk.model.model.norm.add(added, residual)[0], whole)


@torch.inference_mode()
def test_a_call_runs_again_to_the_same_bits(tmp_path: Path) -> None:
    """Though a block may work in the memory of its inputs."""
    walk = Walk(write_model(tmp_path / "plain"))
    batch = walk.batches[0]
    first = walk.run(call_of(walk.model, walk.blocks, 0, batch, None), 0, batch)
    call = call_of(walk.model, walk.blocks, 1, batch, first)

    once, again = walk.run(call, 1, batch), walk.run(call, 1, batch)

    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


ATTENTION = Fold("input_layernorm.weight", None, ("self_attn.qkv_proj",))
VALUES = Fold("self_attn.qkv_proj", slice(128, 192), ("self_attn.o_proj",))
GATE = Fold("post_attention_layernorm.weight", None, ("mlp.gate_up_proj",))
DOWN = Fold("mlp.gate_up_proj", slice(96, 192), ("mlp.down_proj",))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [ATTENTION, GATE, DOWN]),
        ({"num_key_value_heads": 4}, [ATTENTION, VALUES, GATE, DOWN]),
    ],
    ids=["grouped heads", "a value head for each"],
)
@torch.inference_mode()
def test_folds_of_a_llama_are_found_by_trying(
    tmp_path: Path, keys: dict[str, Any], expected: list[Fold]
) -> None:
    walk = Walk(write_model(tmp_path / "plain", **keys))
    batch = walk.batches[0]
    call = call_of(walk.model, walk.blocks, 0, batch, None)
    before = [p.clone() for p in walk.blocks[0].parameters()]

    found = find_folds(walk.blocks[0], lambda: walk.run(call, 0, batch))

    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(walk.blocks[0].parameters(), before, strict=True))


class Flat(nn.Module):
    """A model without blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Flat has no nn\.ModuleList with linear layers"):
        find_blocks(Flat())  # type: ignore[arg-type]
