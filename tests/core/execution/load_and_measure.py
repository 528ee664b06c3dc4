"""Run as a process of its own: load FOLDER in DTYPE and print what anonymous memory it took."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quire.execution.checkpoint import Checkpoint
from quire.execution.weights import load_weights
from quire.interfaces.batch import Batch
from quire.interfaces.model import BuildContext, Model
from quire.interfaces.model_config import ModelConfig
from quire.layers.build import LayerBuilder
from quire_quant.none.method import NoQuantization

VOCAB, HIDDEN, NUM_LAYERS = 20_000, 1024, 10


class Stack(Model):
    """An embedding, fused linears as in an MLP, and a tied head."""

    def __init__(self, config: ModelConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        self.embed_tokens = build.embedding("embed_tokens", VOCAB, HIDDEN)
        sizes, parts = (HIDDEN * 2, HIDDEN), ("gate", "up")
        self.layers = nn.ModuleList(
            build.linear(f"layers.{i}.gate_up", HIDDEN, sizes, parts=parts)
            for i in range(NUM_LAYERS)
        )
        self.lm_head = build.head("lm_head", HIDDEN, VOCAB, tied_to=None)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Not run."""
        return self.embed_tokens(token_ids)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Not run."""
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Not run."""
        return self.lm_head(hidden)


def tensor_shapes() -> dict[str, list[int]]:
    """Return the checkpoint's tensors."""
    shapes = {"embed_tokens.weight": [VOCAB, HIDDEN], "lm_head.weight": [VOCAB, HIDDEN]}
    for i in range(NUM_LAYERS):
        shapes[f"layers.{i}.gate.weight"] = [HIDDEN * 2, HIDDEN]
        shapes[f"layers.{i}.up.weight"] = [HIDDEN, HIDDEN]
    return shapes


def anonymous_bytes() -> int:
    """Return the anonymous memory that is resident."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not tell RssAnon")


class Peak(threading.Thread):
    """Watch anonymous memory until `stop`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self.count = 0
        self._stopped = threading.Event()

    def run(self) -> None:
        """Sample every half millisecond."""
        while not self._stopped.is_set():
            self.bytes = max(self.bytes, anonymous_bytes())
            self.count += 1
            time.sleep(0.0005)

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self.join()


def measure(folder: Path, dtype: str) -> dict[str, Any]:
    """Load and return bytes."""
    torch.set_num_threads(1)
    builder = LayerBuilder(
        dtype=getattr(torch, dtype),
        device=torch.device("cpu"),
        max_model_len=8,
        quantization=NoQuantization({}),
        dense=NoQuantization({}),
    )
    # The first product makes what oneDNN keeps for good.
    torch.nn.functional.linear(torch.ones(2, 8), torch.ones(8, 8))
    checkpoint = Checkpoint.open(folder)
    watch = Peak()
    before = anonymous_bytes()
    model = Stack(ModelConfig(), builder)
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    watch.start()
    load_weights(model, checkpoint)
    watch.stop()
    return {
        "model": sum(sizes),
        "largest": max(sizes),
        "peak": watch.bytes - before,
        "after": anonymous_bytes() - before,
        "samples": watch.count,
    }


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2])))
