"""Build the model on its device, choose the backends, size the KV cache, make the runner."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from attrs import define

from quire.errors import ConfigError
from quire.execution.kv_cache import (
    KVCache,
    LayerGroup,
    ask,
    cache_groups,
    layers_by_spec,
    layout_of,
    make_backends,
    rows_of_slabs,
)
from quire.execution.memory import MemoryBudget, describe_bytes, host_memory_left
from quire.execution.model_runner import ModelRunner
from quire.execution.pooler import Pooler
from quire.execution.pooling_runner import PoolingRunner
from quire.execution.processors import ProcessorChain
from quire.execution.step_graphs import captures_any, decode_sizes, mixed_sizes
from quire.interfaces.attention import (
    AttentionBackend,
    AttentionSpec,
    BatchLimits,
    GraphSupport,
)
from quire.interfaces.model import Model, PoolingModel
from quire.interfaces.model_config import ModelConfig
from quire.interfaces.quantization import QuantizationMethod
from quire.interfaces.sampling import Sampler
from quire.layers.build import LayerBuilder
from quire.layers.weights import WeightStore
from quire.request import MAX_LOGPROBS, SamplingParams
from quire.scheduling.output import AddedSequence, SchedulerOutput

# A GPU is hardly busy with less; on a CPU larger steps are no faster, and keep others waiting.
TOKENS_A_STEP = {"cpu": 2048, "cuda": 8192}
# Steps of 16,384 tokens took 2% less time for 32,000 than those of 8,192, and more memory.
MANY_TOKENS_A_STEP, LARGE_GPU_BYTES = 16384, 64 << 30
GRAPH_BYTES = 4 << 20  # what a graph of some hundred kernels takes beside its tensors


@define(kw_only=True)
class ChosenClasses:
    """The classes that the plugins gave, for one model."""

    model: type[Model]
    quantization: QuantizationMethod
    dense: QuantizationMethod
    sampler: type[Sampler]


def pick_device(wanted: str) -> torch.device:
    """Return the device for `auto`, `cpu` or `cuda`. Raises: ConfigError if there is no GPU."""
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise ConfigError("--device is cuda; PyTorch finds no usable GPU here. Use cpu or auto.")
    use_gpu = has_gpu and wanted != "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if use_gpu else torch.device("cpu")


def set_threads(wanted: int | None) -> None:
    """Set PyTorch's compute threads; by default one for each core that this process may use."""
    torch.set_num_threads(wanted or len(os.sched_getaffinity(0)))


def build_model(
    classes: ChosenClasses,
    config: ModelConfig,
    *,
    dtype: str,
    device: str,
    max_model_len: int,
    batch_invariant: bool = False,
    generates: bool = True,
) -> Model:
    """Build a model with empty weights; on device `meta` it takes no memory."""
    builder = LayerBuilder(
        dtype=getattr(torch, dtype),
        device=torch.device(device),
        max_model_len=max_model_len,
        quantization=classes.quantization,
        dense=classes.dense,
        batch_invariant=batch_invariant,
        generates=generates,
    )
    with torch.inference_mode(False), torch.no_grad():
        return classes.model(config, builder).eval()


def attention_specs(
    model: Model, *, dtype: str, kv_dtype: str, block_size: int, device: str
) -> list[AttentionSpec]:
    """Return the different specs of a model's attention layers, in order."""
    kv_dtype = dtype if kv_dtype == "auto" else kv_dtype
    return list(
        layers_by_spec(model, dtype=dtype, kv_dtype=kv_dtype, block_size=block_size, device=device)
    )


@define(kw_only=True)
class ChosenBackend:
    """The backend of one spec's layers, what it is called, and its checked options."""

    name: str
    backend_class: type[AttentionBackend]
    options: dict[str, Any]


def group_layers(model: Model, chosen: Mapping[AttentionSpec, ChosenBackend]) -> list[LayerGroup]:
    """Group a model's attention layers by spec, each with its backend.

    Only a model that gives vectors may have none, which attends in its own way.
    """
    if not chosen and isinstance(model, PoolingModel):
        return []
    if len({spec.causal for spec in chosen}) > 1:
        raise ConfigError(f"{type(model).__name__} has causal layers and others; Quire needs one.")
    if not chosen:
        raise ConfigError(f"{type(model).__name__} has no attention layer; Quire needs one.")
    spec = next(iter(chosen))
    found = layers_by_spec(
        model,
        dtype=spec.dtype,
        kv_dtype=spec.kv_dtype,
        block_size=spec.block_size,
        device=spec.device,
    )
    return [
        LayerGroup(
            spec=spec,
            layers=layers,
            backend_name=chosen[spec].name,
            backend_class=chosen[spec].backend_class,
            layout=layout_of(chosen[spec].name, chosen[spec].backend_class, spec),
            options=chosen[spec].options,
        )
        for spec, layers in found.items()
    ]


def weight_bytes(model: Model) -> int:
    """Return the bytes of a model's weights once they are loaded, of one that is not yet."""
    total = 0
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        known = module.method.loaded_bytes(module) if isinstance(module, WeightStore) else None
        if known is not None:
            own, total = {name: p for name, p in own.items() if name == "bias"}, total + known
        total += sum(p.numel() * p.element_size() for p in own.values())
    return total


def estimated_activation_bytes(
    config: ModelConfig, limits: BatchLimits, dtype: str, *, generates: bool = True
) -> int:
    """Return an estimate: eight hidden states a token, and the logits in float32 thrice.

    Used where it is not measured: on a CPU, whose allocator does not tell.
    """
    element = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    hidden = 8 * limits.max_num_batched_tokens * config.hidden_size * element
    rows = min(limits.max_num_seqs, limits.max_num_batched_tokens) if generates else 0
    return hidden + 3 * rows * config.vocab_size * 4


@define(kw_only=True)
class Measured:
    """Memory apart from KV blocks: the total that may be used, and what is used of it."""

    total: int
    weights: int
    activations: int
    workspace: int
    graphs: int = 0
    exact: bool

    @property
    def available(self) -> int:
        """Bytes left for KV blocks."""
        used = self.weights + self.activations + self.workspace + self.graphs
        return self.total - used

    def with_blocks(self, kv_bytes: int) -> MemoryBudget:
        """Return the whole budget once the KV blocks are known."""
        return MemoryBudget(
            total=self.total,
            weights=self.weights,
            activations=self.activations,
            workspace=self.workspace,
            kv_blocks=kv_bytes,
            graphs=self.graphs,
            measured=self.exact,
        )


def workspace_bytes(groups: list[LayerGroup], limits: BatchLimits) -> int:
    """Return what the backends' instances hold."""

    def held(group: LayerGroup) -> int:
        found = group.backend_class.workspace_bytes(group.spec, limits)
        if not isinstance(found, int) or found < 0:
            raise ValueError(f"it returns {found!r}, where a number of bytes is wanted")
        return found

    return sum(ask(g.backend_name, "workspace_bytes", partial(held, g)) for g in groups)


def measure_host(*, weights: int, activations: int, workspace: int) -> Measured:
    """Return what is left on the host before the weights are loaded; activations estimated."""
    return Measured(
        total=host_memory_left(),
        weights=weights,
        activations=activations,
        workspace=workspace,
        exact=False,
    )


def measure_gpu(
    runner: ModelRunner,
    groups: list[LayerGroup],
    limits: BatchLimits,
    *,
    share: float,
    weights: int,
) -> Measured:
    """Run the largest batch once and return what it took, weights loaded, of `share` of the GPU.

    Raises: ConfigError if the batch does not fit.
    """
    device = runner.device
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free_before, on_card = torch.cuda.mem_get_info(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    try:
        runner.collect(runner.dispatch(largest_batch(limits, groups)))
    except torch.cuda.OutOfMemoryError:
        raise ConfigError(
            f"a step of --max-num-batched-tokens {limits.max_num_batched_tokens} does not fit in "
            f"the {describe_bytes(free_before)} that the weights leave on the GPU; lower it."
        ) from None
    torch.cuda.synchronize(device)
    activations = torch.cuda.max_memory_allocated(device) - held
    for step in warming_steps(limits, groups):
        runner.collect(runner.dispatch(step))
    taken_by_others = on_card - free_before - weights
    return Measured(
        total=int(on_card * share) - max(0, taken_by_others),
        weights=weights,
        activations=activations,
        workspace=0,
        graphs=_graph_bytes(runner),
        exact=True,
    )


def _graph_bytes(runner: ModelRunner) -> int:
    """Capture what is captured at the start and return what all graphs will take."""
    if not runner.graph_sizes:
        return 0
    torch.cuda.empty_cache()
    free_before, _ = torch.cuda.mem_get_info(runner.device)
    runner.warm_up()
    torch.cuda.synchronize(runner.device)
    torch.cuda.empty_cache()  # what steps outside of graphs took is counted elsewhere
    free_after, _ = torch.cuda.mem_get_info(runner.device)
    # The largest size came first, and others share its memory; each has nodes of its own.
    return max(0, free_before - free_after) + estimated_graph_bytes(runner.graph_sizes)


def estimated_graph_bytes(sizes: list[int]) -> int:
    """Return what the nodes of graphs of these sizes take, their tensors not counted."""
    return GRAPH_BYTES * len(sizes)


def expected_graph_bytes(groups: list[LayerGroup], limits: BatchLimits, activations: int) -> int:
    """Return what graphs will take, where none can be captured to see: nodes and tensors."""
    decode = estimated_graph_bytes(decode_sizes(limits.max_num_seqs))
    if not captures_any(group.backend_class for group in groups):
        return decode
    sizes = mixed_sizes(limits.max_num_batched_tokens, (group.spec for group in groups))
    return decode + estimated_graph_bytes(sizes) + activations


def largest_batch(limits: BatchLimits, groups: list[LayerGroup]) -> SchedulerOutput:
    """Return a step of as many tokens as there may be, for measuring memory."""
    left = limits.max_num_batched_tokens
    lengths: list[int] = []
    while left > 0 and len(lengths) < limits.max_num_seqs:
        lengths.append(min(left, limits.max_model_len))
        left -= lengths[-1]
    params = SamplingParams(
        temperature=1.0, top_p=0.9, repetition_penalty=1.1, logprobs=MAX_LOGPROBS
    )
    return synthetic_step(lengths, groups, params)


def warming_steps(limits: BatchLimits, groups: list[LayerGroup]) -> list[SchedulerOutput]:
    """Return small steps after which no kernel is compiled while somebody waits."""
    longest = min(limits.max_model_len, limits.max_num_batched_tokens)
    short, few = min(1024, longest), min(4, longest)
    greedy, drawn = SamplingParams(temperature=0.0), SamplingParams(temperature=1.0)
    mixed = [1, few] if limits.max_num_seqs > 1 and few < longest else [1]
    return [
        synthetic_step([short], groups, greedy),
        synthetic_step([few], groups, drawn),
        synthetic_step(mixed, groups, greedy),
    ]


def synthetic_step(
    lengths: list[int], groups: list[LayerGroup], params: SamplingParams
) -> SchedulerOutput:
    """Return a step that computes prompts of these lengths, all in block 1."""
    output = SchedulerOutput(step_id=0)
    for number, length in enumerate(lengths):
        output.added.append(
            AddedSequence(
                sequence_id=-1 - number,
                request_id="measurement",
                index=0,
                row=number,
                token_ids=[0] * length,
                num_prompt_tokens=length,
                num_computed_tokens=0,
                block_tables=_block_tables(length, groups),
                params=params,
                seed=0,
            )
        )
        output.num_scheduled_tokens[-1 - number] = length
        output.samples.add(-1 - number)
    return output


def _block_tables(length: int, groups: list[LayerGroup]) -> list[list[int]]:
    if not any(group.has_cache for group in groups):
        return [[1]] * max(1, len(groups))
    return [[1] * -(-length // group.spec.block_size) for group in groups]


def make_runner(
    *,
    model: Model,
    groups: list[LayerGroup],
    num_blocks: int,
    limits: BatchLimits,
    sampler: Sampler,
    processors: ProcessorChain,
    pooler: Pooler | None = None,
) -> ModelRunner:
    """Allocate the KV cache, bind it to the layers and return the runner."""
    device = next(model.parameters()).device
    backends = make_backends(groups, limits)
    kv_cache = KVCache(groups, num_blocks, device, rows=rows_of_slabs(groups))
    kv_cache.bind(groups, backends)
    runner_class = ModelRunner if pooler is None else partial(PoolingRunner, pooler)
    runner = runner_class(
        model=model,
        backends=backends,
        kv_cache=kv_cache,
        groups=cache_groups(groups, num_blocks),
        limits=limits,
        sampler=sampler,
        processors=processors,
    )
    return runner


def can_use_graphs(groups: list[LayerGroup], device: torch.device) -> bool:
    """Whether steps of one token a sequence can be captured: on a GPU, by every backend."""
    supports = [group.backend_class.graph_support for group in groups]
    return device.type == "cuda" and GraphSupport.NONE not in supports


def tokens_a_step(device: torch.device) -> int:
    """Return how many tokens a step has where the options do not say."""
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[1] >= LARGE_GPU_BYTES:
        return MANY_TOKENS_A_STEP
    return TOKENS_A_STEP[device.type]
