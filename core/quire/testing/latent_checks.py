"""The check of a backend's own norm, rotation and write of latents."""

from __future__ import annotations

import attrs
import torch
from attrs import define
from torch import Tensor

from quire.layers.latent_attention import latent_key
from quire.layers.rotary import PairedRotaryTable, RotaryTable
from quire.testing.attention_cases import Case, make_inputs, make_layer
from quire.testing.attention_run import Subject, make_cache
from quire.testing.attention_surroundings import group_of, step_of
from quire.testing.kit_report import Failure

EPS = 1e-6


@define(kw_only=True)
class Given:
    """Queries' part and latents as a model projects them, both cut from wider rows."""

    turned: Tensor
    kv: Tensor
    weight: Tensor
    rotary: RotaryTable


def check_latent_write(subject: Subject, case: Case) -> Failure | None:
    """The fused form of latents is as near to the formula as plain PyTorch is."""
    batch = step_of(case)
    given = _given(case, len(batch.positions))
    backend = subject.make(case)
    cache = make_cache(subject.backend, attrs.evolve(case, poison="zero"))
    plan = backend.plan(batch, group_of(batch))
    backend.prepare(plan)
    layer, norm = make_layer(case, make_inputs(case)), (given.weight, EPS)
    found = backend.rotate_and_write_latents(
        layer, (given.turned, given.kv), batch.positions, given.rotary, norm, cache, plan
    )
    if found is None:
        return None
    queries, keys = found
    rank = case.spec.value_head_dim
    exact = _formula(given, batch.positions, torch.float64)
    plain = _formula(given, batch.positions, given.kv.dtype)
    results = {"queries": queries[..., rank:].cpu(), "keys": keys.cpu()}
    unit = torch.finfo(given.kv.dtype).eps
    for (name, out), right, usual in zip(results.items(), exact, plain, strict=True):
        allowed = unit * right.abs().max().item()
        allowed += 2 * (usual.double() - right).abs().max().item()
        error = (out.double() - right).abs().nan_to_num(torch.inf).max().item()
        if not error <= allowed:
            what = f"rotate_and_write_latents: {name} are off by {error:.3g}, bound {allowed:.3g}"
            return Failure(what=what, case=case)
    rows, slots = cache.flatten(0, 1), batch.groups[-1].slot_mapping.long()
    if not torch.equal(rows[slots], keys):
        return Failure(what="rotate_and_write_latents: other keys are written", case=case)
    rows[slots] = 0
    if bool(rows.any()):
        what = "rotate_and_write_latents: slots of no token of the step are written"
        return Failure(what=what, case=case)
    return None


def _given(case: Case, num_tokens: int) -> Given:
    assert case.spec.latent is not None, case
    rank, rope = case.spec.latent.kv_lora_rank, case.spec.latent.rope_head_dim
    generator = torch.Generator().manual_seed(case.seed)
    dtype, device = getattr(torch, case.spec.dtype), case.spec.device

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    longest = max(seq_len for _, seq_len in case.lengths)
    angles = 6 * torch.rand(longest, rope // 2, generator=generator).to(device)
    kind = PairedRotaryTable if case.seed % 2 else RotaryTable
    return Given(
        turned=draw(num_tokens, case.spec.num_heads, 5 + rope)[..., 5:],
        kv=draw(num_tokens, 3 + rank + rope)[:, 3:],
        weight=draw(rank),
        rotary=kind(angles.cos(), angles.sin(), rope, dtype),
    )


def _formula(given: Given, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return queries and keys computed in a dtype, on the CPU."""
    rotary, at = given.rotary.in_dtype(dtype), positions.cpu()
    turned, kv, weight = (x.cpu().to(dtype) for x in (given.turned, given.kv, given.weight))
    return rotary.rotate(turned, at), latent_key(kv, at, rotary, (weight, EPS))
