"""From checked files to a runner: choose backends, size the memory, load the weights."""

from __future__ import annotations

from typing import Any

import torch
from attrs import evolve

from quire.errors import ConfigError, QuireError
from quire.execution import setup
from quire.execution.dummy_weights import draw_weights
from quire.execution.kv_cache import LayerGroup, bytes_per_slab, cache_groups
from quire.execution.kv_scales import set_scales, source_of_scales
from quire.execution.kv_sizing import KVSize, size_kv_cache, size_without_cache
from quire.execution.layout import Layout
from quire.execution.memory import default_cpu_kv_bytes, describe_bytes
from quire.execution.model_runner import ModelRunner
from quire.execution.pooler import Pooler
from quire.execution.processors import ProcessorChain
from quire.execution.self_check import check_attention, foretell
from quire.execution.step_graphs import Capture, CudaCapture
from quire.execution.weights import checked_places, load_weights, stored_dtypes
from quire.hooks.attention_choice import (
    ALL,
    DECODE,
    PREFILL,
    AttentionChoice,
    choose_attention,
    parts_asked_for,
)
from quire.hooks.builds import build_before_use, build_in_background, tell_what_is_missing
from quire.hooks.invariance import declares_invariance, refuse_layer, refuse_model
from quire.hooks.selection import (
    parse_attention_options,
    select_logits_processors,
    select_sampler,
)
from quire.interfaces.attention import AttentionSpec, BatchLimits
from quire.interfaces.model import Model, PoolingModel
from quire.interfaces.plugin import Selection
from quire.layers.combined_attention import combine
from quire.layers.weights import WeightStore
from quire.pooling_setup import CLASSIFY
from quire.preparation import Prepared, kv_request

# A GPU computes step n while the host plans step n + 1; a CPU has nothing to overlap.
STEPS_IN_FLIGHT = {"cpu": 1, "cuda": 2}


class Starter:
    """From checked files to a runner with weights and KV blocks."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.phases = prepared.phases
        with self.phases.timed("device"):
            self.device = setup.pick_device(prepared.config.device.device)
        if prepared.config.scheduler.max_num_batched_tokens is None:
            least = prepared.least_step
            tokens, source = setup.tokens_a_step(self.device), "default"
            if least > tokens:
                tokens, source = least, "model"
            prepared.config = prepared.config.with_value(
                "max_num_batched_tokens", tokens, source=source
            )
        self.config = prepared.config
        self._generates = prepared.pooling is None
        if self.device.type == "cpu":
            setup.set_threads(self.config.device.num_threads)
        self._dtype = self.config.model.dtype
        self._is_invariant = self.config.device.deterministic
        _, sampler, self._sampler_choice = select_sampler(
            prepared.registry,
            self.config.plugins.sampler,
            self.device.type,
            batch_invariant=self._is_invariant,
        )
        with self.phases.timed("plugins"):
            self._classes = self._load_classes(sampler)
        names = self.config.plugins.logits_processors
        chosen = select_logits_processors(
            prepared.registry, names, batch_invariant=self._is_invariant
        )
        self.processors = {plugin.name: kind for plugin, kind in chosen}

    def _load_classes(self, sampler: type) -> setup.ChosenClasses:
        prepared = self.prepared
        quantization = prepared.quantization.load_class()
        dense = prepared.registry.quantization("none").load_class()
        model = prepared.model.load_class()
        if not issubclass(model, Model):
            raise QuireError(f"{prepared.model.load} is not a quire.interfaces.model.Model.")
        scores = prepared.pooling is not None and prepared.pooling.task == CLASSIFY
        if scores and not issubclass(model, PoolingModel):
            raise QuireError(f"{prepared.model.load} gives no scores: it is no PoolingModel.")
        try:
            chosen = quantization(prepared.raw_config.get("quantization_config") or {})
        except ConfigError as error:
            raise ConfigError(f"{prepared.quantization_path}: {error}") from error
        chosen.stored = stored_dtypes(prepared.checkpoint, model.weight_names)
        return setup.ChosenClasses(
            model=model,
            quantization=chosen,
            dense=dense({}),
            sampler=sampler,
        )

    def plan(self) -> Layout:
        """Choose and size everything without weights: what `quire explain` shows."""
        with self.phases.timed("build"):
            model = self._build("meta")
        if self.config.model.load_format != "dummy":
            with self.phases.timed("weights"):
                checked_places(model, self.prepared.checkpoint)
        with self.phases.timed("choices"):
            return self._plan(model)

    def start(self) -> tuple[ModelRunner, Layout]:
        """Build, plan, load, measure on a GPU, and allocate the KV cache.

        Raises: ConfigError with the memory budget where the GPU has too little memory.
        """
        try:
            return self._start()
        except torch.cuda.OutOfMemoryError:
            raise ConfigError(self._out_of_memory()) from None

    def _out_of_memory(self) -> str:
        """Say what the memory was to be used for, and what to change."""
        budget = self.plan().budget
        items = ", ".join(f"{name} {describe_bytes(size)}" for name, size in budget.items())
        return (
            f"the GPU's memory ran out while the engine started; planned of "
            f"{describe_bytes(budget.total)} were: {items}. Lower --gpu-memory-utilization, "
            "--max-num-batched-tokens or --max-num-seqs, or end what else uses the GPU."
        )

    def _start(self) -> tuple[ModelRunner, Layout]:
        # Not on `meta` first: its operations in Python cost seconds of imports.
        with self.phases.timed("build"):
            model = self._build(str(self.device))
        with self.phases.timed("choices"):
            layout = self._plan(model)
        self._build_plugins(layout.selections)
        with self.phases.timed("weights"):
            self._fill(model)
        if layout.kv_scales is not None:
            with self.phases.timed("kv scales"):
                self._set_scales(model, layout, layout.kv_scales)
        if self.device.type == "cuda":
            with self.phases.timed("measurement"):
                self._measure_on_gpu(model, layout)
        with self.phases.timed("kv cache"):
            runner = self._runner(model, layout, layout.kv_size.num_blocks, layout.limits)
        if not self.config.plugins.skip_self_check:
            with self.phases.timed("self-check"):
                check_attention(layout.groups, layout.limits)
        if runner.graph_sizes:
            with self.phases.timed("graphs"):
                runner.warm_up(is_compiled=self.device.type == "cuda")
        return runner, layout

    def _build_plugins(self, selections: list[Selection]) -> None:
        """Compile what was asked for and is not built; begin to, beside, what was passed over."""
        registry = self.prepared.registry
        names = [(s.kind, name) for s in selections for name in parts_asked_for(s.used).values()]
        if self.device.type == "cuda":
            names.append(("quantization", self.prepared.quantization.name))
        for kind, name in names:
            if not registry.entry(kind, name).is_built():
                with self.phases.timed("native build"):
                    build_before_use(registry, kind, name)
        for choice in selections:
            building = build_in_background(registry, choice.kind, choice.unbuilt)
            tell_what_is_missing(registry, choice, building)

    def _fill(self, model: Model) -> None:
        if self.config.model.load_format == "dummy":
            draw_weights(model, seed=self.config.device.seed)
        else:
            load_weights(model, self.prepared.checkpoint)
            model.finish_loading()

    def _set_scales(self, model: Model, layout: Layout, source: str) -> None:
        checkpoint = self.prepared.checkpoint
        set_scales(model, layout.groups, checkpoint, layout.limits, source=source)

    def _plan(self, model: Model) -> Layout:
        backends, selections = self._choose_backends(model)
        groups = setup.group_layers(model, backends)
        limits = self._limits(self._longest())
        measured = self._measure_host(model, groups, limits)
        if self._uses_graphs(groups):
            measured.graphs = setup.expected_graph_bytes(groups, limits, measured.activations)
        size = self._size(groups, self._kv_bytes(measured))
        return Layout(
            groups=groups,
            selections=[*selections, *([self._sampler_choice] if self._generates else [])],
            kv_size=size,
            budget=measured.with_blocks(_kv_bytes(groups, size)),
            limits=self._limits(size.max_model_len),
            self_check=foretell(groups, skip=self.config.plugins.skip_self_check),
            kv_scales=source_of_scales(
                groups, self.prepared.checkpoint, self.config.cache.kv_cache_scales
            ),
        )

    def _build(self, device: str) -> Model:
        if self._is_invariant and not declares_invariance(self._classes.model):
            raise refuse_model(self.prepared.registry, self.prepared.model.name)
        model = setup.build_model(
            self._classes,
            self.prepared.model_config,
            dtype=self._dtype,
            device=device,
            max_model_len=self._longest(),
            batch_invariant=self._is_invariant,
            generates=self._generates,
        )
        if self._is_invariant:
            self._check_products(model)
        return model

    def _check_products(self, model: Model) -> None:
        """Refuse a quantization method whose layers do not declare what is asked for."""
        for module in model.modules():
            if isinstance(module, WeightStore) and not declares_invariance(module.method):
                raise refuse_layer(
                    self.prepared.registry, self.prepared.quantization.name, module.spec
                )

    def _longest(self) -> int:
        wanted = self.config.model.max_model_len
        own = self.prepared.model_config.max_model_len
        return wanted if isinstance(wanted, int) else own

    def _limits(self, max_model_len: int) -> BatchLimits:
        options = self.config.scheduler
        assert options.max_num_batched_tokens is not None, "set before"
        # A processor that reads tokens on the host needs each step collected before the next.
        overlaps = not any(kind.needs_host_tokens for kind in self.processors.values())
        return BatchLimits(
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_model_len=max_model_len,
            max_steps_in_flight=STEPS_IN_FLIGHT[self.device.type] if overlaps else 1,
        )

    def _choose_backends(
        self, model: Model
    ) -> tuple[dict[AttentionSpec, setup.ChosenBackend], list[Selection]]:
        requested = self.config.plugins.attention_backend
        specs = setup.attention_specs(
            model,
            dtype=self._dtype,
            kv_dtype=self.config.kv_dtype,
            block_size=self.config.cache.block_size,
            device=self.device.type,
        )
        found = {spec: choose_attention(self.prepared.registry, requested, spec) for spec in specs}
        selections: list[Selection] = []
        for choice in found.values():
            if choice.selection not in selections:
                selections.append(choice.selection)
        used = [plugin for choice in found.values() for plugin in choice.plugins]
        given = self.config.plugins.attention_option
        options = parse_attention_options(self.prepared.registry, used, given)
        return {spec: _backend(choice, options) for spec, choice in found.items()}, selections

    def _measure_host(
        self, model: Model, groups: list[LayerGroup], limits: BatchLimits
    ) -> setup.Measured:
        """Estimate before weights are loaded; a GPU's memory is measured again after."""
        activations = setup.estimated_activation_bytes(
            self.prepared.model_config, limits, self._dtype, generates=self._generates
        )
        measured = setup.measure_host(
            weights=setup.weight_bytes(model),
            activations=activations,
            workspace=setup.workspace_bytes(groups, limits),
        )
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            # Weights may have their memory already; they are counted below, not here.
            free += torch.cuda.memory_reserved(self.device)
            measured.total = int(free * self.config.cache.gpu_memory_utilization)
        return measured

    def _kv_bytes(self, measured: setup.Measured) -> int:
        given = self.config.cache.kv_cache_memory_bytes
        if given is not None:
            return given
        if self.device.type == "cpu":
            return min(measured.available, default_cpu_kv_bytes())
        return measured.available

    def _size(self, groups: list[LayerGroup], available: int) -> KVSize:
        if not any(group.has_cache for group in groups):
            source = self.config.source("max_model_len")
            why = {"user": "as asked", "model": "max_seq_length"}.get(source, "the model's own")
            return size_without_cache(self.config.scheduler.max_num_seqs, self._longest(), why)
        request = kv_request(
            self.config,
            self.prepared.model_config,
            available_bytes=available,
            bytes_per_block=bytes_per_slab(groups),
        )
        return size_kv_cache(evolve(request, groups=tuple(cache_groups(groups, 2))))

    def _measure_on_gpu(self, model: Model, layout: Layout) -> None:
        runner = self._runner(model, layout, 2, layout.limits)
        measured = setup.measure_gpu(
            runner,
            layout.groups,
            layout.limits,
            share=self.config.cache.gpu_memory_utilization,
            weights=layout.budget.weights,
        )
        layout.kv_size = self._size(layout.groups, self._kv_bytes(measured))
        layout.budget = measured.with_blocks(_kv_bytes(layout.groups, layout.kv_size))
        layout.limits = self._limits(layout.kv_size.max_model_len)

    def _runner(
        self, model: Model, layout: Layout, num_blocks: int, limits: BatchLimits
    ) -> ModelRunner:
        runner = setup.make_runner(
            model=model,
            groups=layout.groups,
            num_blocks=num_blocks,
            limits=limits,
            sampler=self._classes.sampler(),
            processors=self._processors(limits),
            pooler=self._pooler(model),
        )
        capture = self._capture(layout)
        if capture is not None:
            runner.use_graphs(capture)
        return runner

    def _pooler(self, model: Model) -> Pooler | None:
        """Return what makes vectors, None where tokens are generated."""
        pooling = self.prepared.pooling
        return None if pooling is None else Pooler(model, pooling)

    def _capture(self, layout: Layout) -> Capture | None:
        """Return how steps are captured, None where they are not."""
        return CudaCapture() if self._uses_graphs(layout.groups) else None

    def _uses_graphs(self, groups: list[LayerGroup]) -> bool:
        eager = self.config.device.enforce_eager
        return not eager and self._generates and setup.can_use_graphs(groups, self.device)

    def _processors(self, limits: BatchLimits) -> ProcessorChain:
        vocab_size = self.prepared.model_config.vocab_size
        made = [
            kind(vocab_size, limits.max_num_seqs, str(self.device))
            for kind in self.processors.values()
        ]
        return ProcessorChain(made, limits, self.device)


def _backend(choice: AttentionChoice, options: dict[str, dict[str, Any]]) -> setup.ChosenBackend:
    """Return the class of a choice and its options."""
    name = choice.selection.used
    if ALL in choice.parts:
        plugin, kind = choice.parts[ALL]
        return setup.ChosenBackend(name=name, backend_class=kind, options=options[plugin.name])
    (prefill, prefill_class), (decode, decode_class) = (
        choice.parts[part] for part in (PREFILL, DECODE)
    )
    return setup.ChosenBackend(
        name=name,
        backend_class=combine(prefill_class, decode_class),
        options={PREFILL: options[prefill.name], DECODE: options[decode.name]},
    )


def _kv_bytes(groups: list[LayerGroup], size: KVSize) -> int:
    return size.num_blocks * bytes_per_slab(groups)
