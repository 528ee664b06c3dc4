"""Compile the kernels of mixtures for an H100 without one: registers, spills, shared memory.

    python tests/benchmarks/compile_experts.py

Each launch of one token, of some and of many is compiled with its arguments, in the sizes of
Qwen3-30B-A3B and Mixtral. Fails where a kernel spills registers or does not fit.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from compile_attention import TYPES, Recorder, compiled, usage_of

from quire_kernels import experts, few_experts, routing

# Experts, experts a token, hidden size, an expert's size.
MODELS = {"qwen3-30b-a3b": (128, 8, 2048, 768), "mixtral-8x7b": (8, 2, 4096, 14336)}
TOKENS = (1, 64, 4096)
TYPES[torch.int64] = "*i64"


def launches_of(model: str, num_tokens: int, dtype: torch.dtype) -> list[tuple[Any, dict]]:
    """Return the kernels that a number of tokens launch, and their arguments."""
    num_experts, top_k, hidden, size = MODELS[model]
    found: list[tuple[Any, dict]] = []
    own = [
        (module, name, kernel)
        for module in (experts, few_experts, routing)
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    ]
    for module, name, kernel in own:
        setattr(module, name, Recorder(kernel, found))
    try:
        logits = torch.rand(num_tokens, num_experts)
        experts.experts(
            torch.empty(num_tokens, hidden, dtype=dtype),
            torch.empty(num_experts, 2 * size, hidden, dtype=dtype),
            torch.empty(num_experts, hidden, size, dtype=dtype),
            *routing.route(logits, top_k, normalise=True),
        )
    finally:
        for module, name, kernel in own:
            setattr(module, name, kernel)
    return found


def main() -> None:
    """Print a table; exit with 1 where a kernel spills or does not fit."""
    bad = 0
    print(f"{'model':16}{'tokens':>7} {'kernel':18}{'rows':>5}{'registers':>10}{'shared':>8}")
    for model in MODELS:
        for num_tokens in TOKENS:
            for kernel, arguments in launches_of(model, num_tokens, torch.bfloat16):
                usage = usage_of(compiled(kernel, arguments))
                bad += not usage.is_good
                print(
                    f"{model:16}{num_tokens:7} {kernel.__name__:18}{arguments.get('ROWS', 1):5}"
                    f"{usage.registers:10}{usage.shared_bytes:8}"
                    f"{'' if usage.is_good else '  <- spills or does not fit'}",
                    flush=True,
                )
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
