"""Batches of calibration tokens, and the attention that they need."""

from __future__ import annotations

import torch
from attrs import define, evolve
from torch import nn

from quire.errors import ConfigError
from quire.execution import setup
from quire.execution.kv_cache import KVCache, LayerGroup, make_backends
from quire.execution.synthetic_batch import Span, batch_of, block_tables
from quire.hooks.attention_choice import ALL, choose_attention
from quire.hooks.selection import parse_attention_options
from quire.interfaces.attention import AttentionBackend, BatchLimits
from quire.interfaces.batch import Batch
from quire.interfaces.model import Model
from quire.layers.attention import Attention
from quire.preparation import Prepared


@define(kw_only=True)
class Attending:
    """The backends of a model's layers on one KV cache that all layers share.

    A layer's keys and values are read only while the layer itself runs.
    """

    groups: list[LayerGroup]
    backends: list[AttentionBackend]
    cache: KVCache

    @classmethod
    def of(cls, model: Model, groups: list[LayerGroup], lengths: list[list[int]]) -> Attending:
        """Allocate for batches of sequences of these lengths."""
        block_size = groups[0].spec.block_size
        limits = BatchLimits(
            max_num_seqs=max(map(len, lengths)),
            max_num_batched_tokens=max(map(sum, lengths)),
            max_model_len=max(map(max, lengths)),
            max_steps_in_flight=1,
        )
        num_blocks = max(block_tables(one, block_size)[1] for one in lengths)
        device = next(p.device for p in model.parameters() if not p.is_meta)
        first = [evolve(group, layers=group.layers[:1]) for group in groups]
        return cls(
            groups=groups,
            backends=make_backends(groups, limits),
            cache=KVCache(first, num_blocks, device),
        )

    def bind(self, block: nn.Module) -> None:
        """Give a block's attention layers their backend, once their weights are there."""
        numbers = {id(layer): n for n, group in enumerate(self.groups) for layer in group.layers}
        for layer in block.modules():
            if isinstance(layer, Attention):
                number = numbers[id(layer)]
                layer.bind(self.backends[number], self.cache.tensors[number][0], number)

    def plan(self, batch: Batch) -> None:
        """Plan a batch just before it runs: backends may keep one plan only."""
        batch.plans = [backend.plan(batch, i) for i, backend in enumerate(self.backends)]
        for backend, plan in zip(self.backends, batch.plans, strict=True):
            backend.prepare(plan)


def choose_groups(
    prepared: Prepared, model: Model, device: torch.device
) -> tuple[list[LayerGroup], str]:
    """Return a model's attention layers with their backends, and what those are called.

    Raises: ConfigError where no backend serves them.
    """
    requested = prepared.config.plugins.attention_backend
    specs = setup.attention_specs(
        model,
        dtype=prepared.config.model.dtype,
        kv_dtype="auto",
        block_size=prepared.config.cache.block_size,
        device=device.type,
    )
    chosen, names = {}, []
    for spec in specs:
        choice = choose_attention(prepared.registry, requested, spec)
        if ALL not in choice.parts:
            raise ConfigError(f"--attention-backend {requested}: name one backend to calibrate.")
        plugin, backend = choice.parts[ALL]
        options = parse_attention_options(prepared.registry, [plugin], ())
        chosen[spec] = setup.ChosenBackend(
            name=plugin.name, backend_class=backend, options=options[plugin.name]
        )
        names.append(plugin.name)
    return setup.group_layers(model, chosen), "+".join(dict.fromkeys(names))


def make_batches(
    samples: list[list[int]], groups: list[LayerGroup], max_tokens: int
) -> list[Batch]:
    """Return the batches of the samples in their order, each of at most `max_tokens` tokens."""
    spec = groups[-1].spec
    packed: list[list[list[int]]] = [[]]
    for sample in samples:
        if packed[-1] and sum(map(len, packed[-1])) + len(sample) > max_tokens:
            packed.append([])
        packed[-1].append(sample)
    batches = []
    for own in packed:
        # A batch has sequences of one token first.
        own.sort(key=lambda sample: len(sample) > 1)
        tables, _ = block_tables([len(sample) for sample in own], spec.block_size)
        spans = [Span(i, 0, len(sample)) for i, sample in enumerate(own)]
        batch = batch_of(spans, tables, spec, len(groups) - 1)
        ids = [token for sample in own for token in sample]
        batch.token_ids = torch.tensor(ids, dtype=torch.int32, device=spec.device)
        # All tokens' rows go through the last block too.
        batch.logit_rows = torch.arange(len(ids), dtype=torch.int32, device=spec.device)
        batches.append(batch)
    return batches
