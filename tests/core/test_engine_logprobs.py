"""What log-probabilities cost: no tensor of all logits of a prompt, and no stale block read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
from tiny_llama import make_engine, prompt, request, run_all
from torch.utils._python_dispatch import TorchDispatchMode

VOCAB = 1009


class Largest(TorchDispatchMode):
    """Count the rows of the largest tensor that has a column for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (VOCAB,):
                self.rows = max(self.rows, tensor.numel() // VOCAB)
        return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write_folder(tmp_path_factory.mktemp("llama"), vocab_size=VOCAB)


@pytest.mark.parametrize("max_num_seqs", [2, 8])
def test_logits_of_a_prompt_are_made_in_slices(folder: Path, max_num_seqs: int) -> None:
    engine = make_engine(folder, max_num_seqs=max_num_seqs)
    asks = [request(i, prompt(i, 150), prompt_logprobs=5, logprobs=3) for i in range(3)]

    with Largest() as largest:
        _, updates = run_all(engine, asks)

    scored = [len(u.prompt_logprobs) for u in updates if u.prompt_logprobs is not None]
    assert scored == [150, 150, 150]
    assert 0 < largest.rows <= max_num_seqs


def test_a_scored_prompt_is_computed_anew_and_others_share_its_blocks(folder: Path) -> None:
    engine = make_engine(folder)
    same = prompt(0, 40)
    run_all(engine, [request(0, same)])
    blocks = engine.block_manager

    _, updates = run_all(engine, [request(1, same, prompt_logprobs=0)])
    after_scored = blocks.num_hit_tokens
    run_all(engine, [request(2, same)])

    assert after_scored == 0
    assert blocks.num_hit_tokens > 0
    assert len(updates[0].prompt_logprobs or ()) == 40
