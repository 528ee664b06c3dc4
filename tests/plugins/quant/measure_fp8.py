"""Run as a process of its own: load linears on the fly and print what anonymous memory it took."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "core/execution"))

from load_and_measure import Peak, Stack, anonymous_bytes

from quire.execution.checkpoint import Checkpoint
from quire.execution.setup import weight_bytes
from quire.execution.weights import load_weights
from quire.interfaces.model_config import ModelConfig
from quire.layers.build import LayerBuilder
from quire_quant.fp8.method import Fp8
from quire_quant.none.method import NoQuantization


def main() -> None:
    """Load the folder in float32."""
    torch.set_num_threads(1)
    builder = LayerBuilder(
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_model_len=8,
        quantization=Fp8({}),
        dense=NoQuantization({}),
    )
    torch.nn.functional.linear(torch.ones(2, 8), torch.ones(8, 8))
    checkpoint = Checkpoint.open(Path(sys.argv[1]))
    watch, before = Peak(), anonymous_bytes()
    model = Stack(ModelConfig(), builder)
    foretold = weight_bytes(model)
    watch.start()
    load_weights(model, checkpoint)
    watch.stop()
    found = {
        "foretold": foretold,
        "held": sum(p.numel() * p.element_size() for p in model.parameters()),
        "peak": watch.bytes - before,
        "after": anonymous_bytes() - before,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
