"""Quantize a checkpoint: block after block, each written as soon as it is done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from attrs import asdict, define, frozen

from quire.errors import ConfigError
from quire.execution import setup
from quire.execution.checkpoint import Checkpoint
from quire.execution.model_folder import CONFIG_FILE
from quire.hooks.selection import select_quantization
from quire.interfaces.model import Model
from quire.interfaces.plugin import QuantizationPlugin
from quire.interfaces.quantization import (
    QuantizationMethod,
    QuantizerOptions,
    WeightQuantizer,
)
from quire.layers.embedding import Embedding, Head
from quire.layers.linear import Linear
from quire.layers.places import Place
from quire.preparation import Prepared
from quire.quantize.batches import Attending, choose_groups, make_batches
from quire.quantize.block import BlockWork
from quire.quantize.blocks import Call, call_of, find_blocks
from quire.quantize.calibration import digest_of
from quire.quantize.folder import OutputFolder, locked
from quire.quantize.streaming import (
    Streaming,
    Tensors,
    check_names,
    fill,
    part_names,
    release,
)

TOKENS_A_BATCH = {"cpu": 2048, "cuda": 8192}


@frozen(kw_only=True)
class Job:
    """What is to be done. `samples` are empty for a method that is not calibrated."""

    prepared: Prepared
    method: QuantizationPlugin
    options: QuantizerOptions
    samples: list[list[int]]
    output: Path


@define(kw_only=True)
class Done:
    """What was written: bytes of tensors before and after, and each linear's relative error."""

    bytes_before: int
    bytes_after: int
    errors: dict[str, float]


class Progress(Protocol):
    """Who is told how a job goes on."""

    def begin(self, num_blocks: int, num_finished: int) -> None:
        """Tell how many blocks there are, and how many an earlier run finished."""

    def linear(self, name: str, error: float) -> None:
        """Tell a linear's relative error."""

    def block(self) -> None:
        """Tell that one block more is written."""


@torch.inference_mode()
def quantize(job: Job, progress: Progress) -> Done:
    """Write the checkpoint. Raises: ConfigError, CheckpointError, PluginError."""
    work = _Quantization(job)
    with locked(job.output):
        return work.run(progress)


class _Quantization:
    def __init__(self, job: Job) -> None:
        self.job, self.prepared = job, job.prepared
        self.device = setup.pick_device(self.prepared.config.device.device)
        if self.device.type == "cpu":
            setup.set_threads(self.prepared.config.device.num_threads)
        self.checkpoint = self.prepared.checkpoint
        self.tensors = Tensors(self.checkpoint)
        self.quantizer = _quantizer_of(job)
        self.model = self._build()
        self.places = check_names(self.model, self.checkpoint)
        self.blocks_name, self.blocks = find_blocks(self.model)
        self.excluded = self._excluded()
        self.config = self.quantizer.config(self.excluded)
        self.reader = _reader_of(self.prepared, self.config)
        self._check_linears()

    def _build(self) -> Model:
        streaming = Streaming(self.tensors)
        classes = setup.ChosenClasses(
            model=self.prepared.model.load_class(),
            quantization=streaming,
            dense=streaming,
            sampler=object,  # type: ignore[arg-type] # nothing is sampled
        )
        longest = max(map(len, self.job.samples), default=1)
        return setup.build_model(
            classes,
            self.prepared.model_config,
            dtype=self.prepared.config.model.dtype,
            device=str(self.device),
            max_model_len=longest,
        )

    def _excluded(self) -> list[str]:
        """Return the modules that stay as they are: heads, linears outside the blocks, and such."""
        inside = {id(module) for block in self.blocks for module in block.modules()}
        found: list[str] = []
        for module in self.model.modules():
            is_outside = isinstance(module, Linear) and id(module) not in inside
            if is_outside or isinstance(module, Head):
                found += part_names(module.spec)
        # Matrices that are no linear layers, such as the projection from latents.
        layers = (Linear, Head, Embedding)
        for name, place in self.places.items():
            is_weight = name.endswith(".weight") and not isinstance(place.module, layers)
            if is_weight and place.view().dim() == 2:
                found.append(name.removesuffix(".weight"))
        return found

    def _check_linears(self) -> None:
        """Ask before any work whether all layers can be written. Raises: ConfigError."""
        for block in self.blocks:
            for module in block.modules():
                if not isinstance(module, Linear):
                    continue
                why_not = self.reader.why_unsupported(module.spec)
                if why_not is not None:
                    raise ConfigError(
                        f"--method {self.job.method.name} cannot quantize {module.spec.name!r}: "
                        f"{why_not}. Other sizes: --group-size."
                    )

    def run(self, progress: Progress) -> Done:
        """Do the blocks and what is around them."""
        attending, backends, batches = None, "", []
        if self.job.samples:
            groups, backends = choose_groups(self.prepared, self.model, self.device)
            batches = make_batches(self.job.samples, groups, TOKENS_A_BATCH[self.device.type])
            lengths = [batch.query_lens for batch in batches]
            attending = Attending.of(self.model, groups, lengths)
            self._fill_around()
        count = len(self.blocks)
        folder = OutputFolder(self.job.output, self._settings(backends), count + 1)
        left = [index for index in range(count) if folder.note_of(index) is None]
        progress.begin(count, count - len(left))
        errors: dict[str, float] = {}
        outputs: list[Any] = [None] * len(batches)
        for index, block in enumerate(self.blocks):
            own = self._places_in(block)
            note = folder.note_of(index)
            # A finished block is run again only for the inputs of those that are not.
            if note is not None and (not batches or not left or index > left[-1]):
                errors |= note
                continue
            fill(own, self.checkpoint)
            calls: list[Call] = []
            if attending is not None:
                attending.bind(block)
                for batch, previous in zip(batches, outputs, strict=True):
                    calls.append(call_of(self.model, self.blocks, index, batch, previous))
            outputs = [None] * len(batches)
            work = BlockWork(block, own, self.quantizer, self.reader, attending)
            if note is None:
                written = work.quantize(calls, batches, self.tensors)
                note = work.errors
                folder.write_shard(index, written, note)
                for name, error in note.items():
                    progress.linear(name, error)
                progress.block()
            if calls and index + 1 < count:
                work.take_back(folder.read_shard(index))
                outputs = work.run(calls, batches)
            errors |= note
            release(block.modules())
        return self._finish(folder, errors)

    def _finish(self, folder: OutputFolder, errors: dict[str, float]) -> Done:
        count = len(self.blocks)
        if folder.note_of(count) is None:
            inside = {name for block in self.blocks for name in self._places_in(block)}
            rest = [name for name in self.checkpoint.tensors if name not in inside]
            folder.write_shard(count, {name: self.tensors.get(name) for name in rest}, {})
        config = {**self.prepared.raw_config, "quantization_config": self.config}
        after = folder.finish(config, self.prepared.folder)
        return Done(bytes_before=self.checkpoint.num_bytes, bytes_after=after, errors=errors)

    def _places_in(self, block: torch.nn.Module) -> dict[str, Place]:
        inside = {id(module) for module in block.modules()}
        return {n: place for n, place in self.places.items() if id(place.module) in inside}

    def _fill_around(self) -> None:
        """Load what runs before and between the blocks; look-ups stay in their file."""
        inside = {id(module) for block in self.blocks for module in block.modules()}
        around = {
            name: place
            for name, place in self.places.items()
            if id(place.module) not in inside and not isinstance(place.module, (Embedding, Head))
        }
        fill(around, self.checkpoint)

    def _settings(self, attention: str) -> Mapping[str, Any]:
        """Return all that the written bytes depend on."""
        return {
            "source": _digest_of_source(self.checkpoint),
            "method": self.job.method.name,
            "options": asdict(self.job.options),
            "calibration": digest_of(self.job.samples) if self.job.samples else None,
            "attention": attention or None,
            "device": self.device.type,
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            "quantization_config": self.config,
        }


def _quantizer_of(job: Job) -> WeightQuantizer:
    found = job.method.load_quantizer()
    if found is None or not issubclass(found, WeightQuantizer):
        raise ConfigError(f"--method {job.method.name} writes no checkpoints.")
    return found(job.options)


def _reader_of(prepared: Prepared, config: Mapping[str, Any]) -> QuantizationMethod:
    """Return what a checkpoint with this configuration will be read by. Raises: ConfigError."""
    name, form = str(config["quant_method"]), config.get("format")
    claim = f"{name}:{form}" if isinstance(form, str) else name
    plugin, _ = select_quantization(prepared.registry, None, claim)
    reader: QuantizationMethod = plugin.load_class()(config)
    return reader


def _digest_of_source(checkpoint: Checkpoint) -> str:
    """Return a name for a checkpoint's files as they are now, without reading all of them."""
    files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    shapes = sorted((t.name, t.dtype, t.shape) for t in checkpoint.tensors.values())
    config = (checkpoint.folder / CONFIG_FILE).read_text(encoding="utf-8")
    return hashlib.sha256(json.dumps([stats, shapes, config]).encode()).hexdigest()
