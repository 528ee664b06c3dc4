"""The engine as its process serves it: with figures for `/metrics`."""

from __future__ import annotations

import time
from typing import Any

from quire.engine import Engine
from quire.server.messages import Ready, StepStats

GPU_PERIOD_S = 2.0  # asking the driver takes up to a millisecond


class ServedEngine:
    """An engine and what is told of it after each step."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._gpu = _gpu_of(engine)
        self._gpu_asked_at = float("-inf")
        self.add_request = engine.add_request
        self.begin_form = engine.begin_form
        self.abort = engine.abort
        self.has_unfinished = engine.has_unfinished
        self.step = engine.step
        self.finish_sequence = engine.finish_sequence

    def ready(self, phases_s: dict[str, float]) -> Ready:
        """Say what was loaded."""
        engine = self._engine
        return Ready(
            max_model_len=engine.max_model_len,
            num_blocks=self._kv_blocks()[1],
            block_size=engine.config.cache.block_size,
            phases_s=phases_s,
            identity=_identity(engine),
            max_step_tokens=engine.config.scheduler.max_num_batched_tokens or 0,
        )

    def stats(self) -> StepStats:
        """Return where the engine stands."""
        engine = self._engine
        timing, scheduler, blocks = engine.timing, engine.scheduler, engine.block_manager
        num_used, num_blocks = self._kv_blocks()
        return StepStats(
            scheduler.num_running,
            scheduler.num_waiting,
            num_used,
            num_blocks,
            blocks.num_queried_tokens,
            blocks.num_hit_tokens,
            scheduler.num_preemptions,
            timing.step_s,
            timing.host_s,
            timing.num_tokens,
            timing.num_seqs,
            *self._gpu_figures(),
        )

    def _kv_blocks(self) -> tuple[int, int]:
        """Return the blocks in use and all blocks; those of an encoder hold nothing."""
        if not self._engine.layout.has_kv_cache:
            return 0, 0
        blocks = self._engine.block_manager
        return blocks.num_used_blocks, blocks.num_blocks

    def started(self) -> list[str]:
        """Return the requests that computed for the first time in the last step."""
        return self._engine.timing.started

    def _gpu_figures(self) -> tuple[int | None, int | None, float | None]:
        now = time.monotonic()
        if self._gpu is None or now - self._gpu_asked_at < GPU_PERIOD_S:
            return None, None, None
        self._gpu_asked_at = now
        return gpu_figures(self._gpu)


def _identity(engine: Engine) -> list[str]:
    """Return model, plugins, versions and mode, of which each may change what numbers come out."""
    import torch

    prepared, config = engine.prepared, engine.config
    device = engine.runner.device
    is_gpu = device.type == "cuda"
    chip = torch.cuda.get_device_name(device) if is_gpu else torch.backends.cpu.get_cpu_capability()
    lines = [
        f"model: {config.model.model} {config.model.revision or ''}".rstrip(),
        f"architecture: {', '.join(prepared.raw_config['architectures'])}",
        f"device: {device.type} {chip}",
        f"torch: {torch.__version__}",
        f"dtype: {config.model.dtype}, KV cache {config.kv_dtype}",
        f"mode: {'deterministic' if config.device.deterministic else 'fast'}",
    ]
    names = config.plugins.logits_processors
    chosen = [(s.kind, s.used) for s in engine.selections]
    for kind, used in [*chosen, *(("logits-processor", name) for name in names)]:
        for part in used.split(","):
            owner = prepared.registry.entry(kind, part.rpartition("=")[2]).owner
            lines.append(f"{kind}: {part} of {owner.distribution} {owner.version}")
    return lines


def _gpu_of(engine: Engine) -> Any | None:
    device = engine.runner.device
    return device if device.type == "cuda" else None


def gpu_figures(device: Any) -> tuple[int, int, float | None]:
    """Return used and total bytes, and the share of time that kernels ran, where it is known."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    try:
        utilization = torch.cuda.utilization(device) / 100
    except (ImportError, RuntimeError):  # without NVIDIA's management library
        utilization = None
    return total - free, total, utilization
