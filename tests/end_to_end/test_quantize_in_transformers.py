"""Transformers with compressed-tensors runs what `quire quantize` writes as Quire does.

Skipped where compressed-tensors is not installed: `pip install compressed-tensors==0.20.0`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.cli.main import main

pytest.importorskip("compressed_tensors")
from transformers import AutoModelForCausalLM

from quire import LLM
from quire.benchmark.quality import logits_of
from quire_quant.int8 import rounded

DEMO = Path(__file__).parents[2] / "plugins/models/quire_models/demo/model"
TEXT = "<|im_start|>user\nA large latte with oat milk, please.<|im_end|>\n<|im_start|>assistant\n"
# How much nearer the two must be to each other than to the model in its own dtype. With int8 the
# largest input of each token lies between two numbers of compressed-tensors, and goes to either.
METHODS: dict[str, tuple[list[str], float]] = {
    "int4": (["--group-size", "64"], 1e-6),
    "fp8": ([], 1e-6),
    "int8": ([], 0.5),
}


def divergence(true: Tensor, other: Tensor) -> float:
    """Return the mean KL divergence in nats."""
    a, b = true.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean())


def transformers_logits(folder: Path, ids: list[int]) -> Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, :-1]


def rounded_as_the_tool_does(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to int8 by their largest by 127.5, where Quire and vLLM take 127."""
    scale = x.abs().amax(1) / 127.5
    return ((x / scale[:, None]).round().clamp(-128, 127) + 128).to(torch.uint8), scale


@pytest.mark.parametrize("method", METHODS)
def test_transformers_gives_the_logits_that_quire_gives(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounded.ops, "quantize_rows", rounded_as_the_tool_does)
    given, share = METHODS[method]
    output = tmp_path / method
    assert main(["quantize", "demo", "--method", method, "--output", str(output), *given]) == 0
    llm = LLM(str(output), dtype="float32", device="cpu", attention_backend="sdpa")
    ids = llm.frontend.require_tokenizer().encode(TEXT)

    ours, theirs = logits_of(llm, ids), transformers_logits(output, ids)

    plain = transformers_logits(DEMO, ids)
    between, to_plain = divergence(theirs, ours), divergence(plain, theirs)
    print(f"{method}: between the two {between:.2e}, to the plain model {to_plain:.2e}")
    assert to_plain > 1e-5
    assert between < share * to_plain
