"""Greedy and random sampling in Triton, which reads the logits once where nothing filters."""

from __future__ import annotations

from torch import Tensor
from triton import knobs

from quire.interfaces.sampling import SampledTokens, Sampler, SamplingBatch
from quire_kernels import sampling


class TritonSampler(Sampler):
    """Draw as `reference` does. The host's flags choose kernels, and nothing reads the device, so
    that a CUDA graph may hold the call: with `any_top_k` it then serves rows of every kind.
    """

    capturable = True
    batch_invariant = True

    @classmethod
    def why_unsupported(cls, device: str) -> str | None:
        """Ask for a GPU, or for Triton's interpreter."""
        if device.startswith("cuda") or knobs.runtime.interpret:
            return None
        return f"Triton has no compiler for {device!r}, and TRITON_INTERPRET=1 is not set"

    def sample(self, logits: Tensor, batch: SamplingBatch) -> SampledTokens:
        """Draw one token a row."""
        if batch.suppressed is not None:
            logits[batch.suppressed] = float("-inf")
        is_filtered = batch.any_top_k or batch.any_top_p or batch.any_min_p
        token_ids, status = sampling.sample(
            logits if logits.stride(1) == 1 else logits.contiguous(),
            batch.temperature,
            batch.seed,
            batch.child_index,
            batch.position,
            (batch.top_k, batch.top_p, batch.min_p) if is_filtered else None,
        )
        return SampledTokens(token_ids=token_ids.unsqueeze(1), status=status)
