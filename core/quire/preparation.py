"""Everything that can be checked before torch is imported: options, plugins, files.

A wrong folder, key, option or header ends here, within a fraction of a second.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attrs import Factory, define

from quire.config import KV_FORMATS, EngineConfig, option_name
from quire.errors import ConfigError
from quire.execution.checkpoint import Checkpoint
from quire.execution.kv_format import is_scale, kv_format_of
from quire.execution.kv_sizing import KVRequest, size_kv_cache
from quire.execution.model_folder import (
    CONFIG_FILE,
    architectures,
    find_folder,
    find_quantization,
    read_config,
)
from quire.hooks.attention_choice import parts_asked_for
from quire.hooks.grammars import select_grammar
from quire.hooks.parser_choice import require_reasoning_parser, require_tool_call_parser
from quire.hooks.registry import Registry, load_plugins
from quire.hooks.selection import (
    AUTO,
    RemoteCode,
    parse_attention_options,
    select_model,
    select_quantization,
)
from quire.interfaces.answer_parsing import ReasoningParser, ToolCallParser
from quire.interfaces.model_config import ModelConfig
from quire.interfaces.plugin import GrammarPlugin, ModelPlugin, QuantizationPlugin, Selection
from quire.phases import Phases
from quire.pooling_setup import GENERATE, PoolingSetup, find_setup, transformer_folder

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@define(kw_only=True)
class Prepared:
    """What a start needs to know before it imports torch. `config` has no dtype `auto` left.

    `quantization_path` is the file that says how the checkpoint is quantized, if it is.
    """

    config: EngineConfig
    folder: Path
    raw_config: dict[str, Any]
    model_config: ModelConfig
    model: ModelPlugin
    quantization: QuantizationPlugin
    quantization_path: Path
    checkpoint: Checkpoint
    registry: Registry
    grammar: GrammarPlugin | None = None
    why_no_grammar: str = ""
    selections: list[Selection] = Factory(list)
    warnings: list[str] = Factory(list)
    phases: Phases = Factory(Phases)
    pooling: PoolingSetup | None = None

    @property
    def least_step(self) -> int:
        """Tokens that a step must have room for: a whole sequence's, where it is computed whole."""
        if self.pooling is None or not self.pooling.needs_whole:
            return 1
        wanted = self.config.model.max_model_len
        return wanted if isinstance(wanted, int) else self.model_config.max_model_len

    def tokenizer_folder(self) -> Path:
        """Return the folder with the tokenizer. Raises: ConfigError."""
        wanted = self.config.model.tokenizer
        if wanted is None:
            return self.folder
        return find_folder(
            wanted,
            revision=None,
            bundled=self.registry.names("checkpoint"),
            open_bundled=self.registry.checkpoint,
            with_weights=False,
        )

    def describe(self) -> str:
        """Return what is loaded, in a few words."""
        name, model = self.raw_config["architectures"][0], self.config.model
        return f"{model.model} ({name}, {model.dtype})"


def prepare(config: EngineConfig, phases: Phases | None = None) -> Prepared:
    """Check all that can be checked without torch; `phases` already holds what came before.

    Raises: ConfigError, CheckpointError or PluginError, each in one line.
    """
    phases = phases or Phases()
    with phases.timed("checks"):
        prepared = _prepare(config)
    prepared.phases = phases
    return prepared


def _prepare(config: EngineConfig) -> Prepared:
    registry = load_plugins(config.plugins.disable_plugin)
    is_dummy = config.model.load_format == "dummy"
    root = _find_root(config, registry, with_weights=not is_dummy)
    folder = transformer_folder(root)
    path = folder / CONFIG_FILE
    raw, quantization_path = find_quantization(read_config(folder), folder)
    model, model_choice = _select_model(config, registry, raw, path)
    model_config = model.config_class.from_json(raw, source=str(path))
    _check_attention_options(config, registry)
    with _naming(quantization_path, "quantization_config"):
        quantization, quantization_choice = select_quantization(
            registry, config.plugins.quantization, _quant_method(raw, quantization_path)
        )
    checkpoint = Checkpoint(folder=folder) if is_dummy else Checkpoint.open(folder)
    pooling = find_setup(
        (config.model.task, config.model.pooling),
        served=model.task,
        folder=root,
        raw_config=raw,
        is_encoder=model.task != GENERATE and model_config.is_encoder,
    )
    grammar_found = select_grammar(registry, config.plugins.grammar_backend)
    grammar, grammar_choice, why_no_grammar = grammar_found
    config = _with_dtype(config, model_config, checkpoint)
    with _naming(quantization_path, "quantization_config"):
        config = _with_kv_format(config, raw)
    config = _with_pooling(config, model_config, pooling)
    has_cache = pooling is None or not model_config.is_encoder
    _check_lengths(config, model_config, raw, has_cache=has_cache)
    return Prepared(
        config=config,
        folder=folder,
        raw_config=raw,
        model_config=model_config,
        model=model,
        quantization=quantization,
        quantization_path=quantization_path,
        checkpoint=checkpoint,
        registry=registry,
        grammar=grammar,
        why_no_grammar=why_no_grammar,
        selections=_made(model_choice, quantization_choice, None if pooling else grammar_choice),
        pooling=pooling,
        warnings=[*model_config.warnings, *_warnings(config, checkpoint, has_cache=has_cache)],
    )


def _select_model(
    config: EngineConfig, registry: Registry, raw: dict[str, Any], path: Path
) -> tuple[ModelPlugin, Selection]:
    """Choose what builds the model. Raises: ConfigError, for code that is not trusted, too."""
    is_trusted = config.model.trust_remote_code
    with _naming(path, "architectures"):
        found = select_model(
            registry,
            architectures(raw, path),
            config.plugins.model_implementation,
            remote_code=_remote_code(raw, trusted=is_trusted),
        )
    _refuse_remote_code(raw, path, trusted=is_trusted)
    return found


def _find_root(config: EngineConfig, registry: Registry, *, with_weights: bool) -> Path:
    return find_folder(
        config.model.model,
        revision=config.model.revision,
        with_weights=with_weights,
        with_code=config.model.trust_remote_code,
        bundled=registry.names("checkpoint"),
        open_bundled=registry.checkpoint,
    )


def _made(*choices: Selection | None) -> list[Selection]:
    return [choice for choice in choices if choice is not None]


def _with_pooling(
    config: EngineConfig, model_config: ModelConfig, pooling: PoolingSetup | None
) -> EngineConfig:
    """Take over what a model that gives vectors asks for. Raises: ConfigError."""
    if pooling is None:
        if config.model.pooling != AUTO:
            raise ConfigError("--pooling needs a model that embeds; add --task embed.")
        return config
    if config.device.deterministic and pooling.modules:
        raise ConfigError(
            "--deterministic: modules after pooling do not keep their bits; leave it out."
        )
    if config.plugins.logits_processors:
        raise ConfigError("--logits-processors: this model gives no tokens; leave them out.")
    if pooling.needs_whole and config.source("enable_prefix_caching") == "default":
        config = config.with_value("enable_prefix_caching", False, source="model")
    if pooling.needs_whole and config.cache.enable_prefix_caching and not model_config.is_encoder:
        raise ConfigError(
            "--enable-prefix-caching: vectors of all tokens are asked for, so that none may come "
            "from a cache; leave it out, or take --pooling lasttoken."
        )
    if config.model.max_model_len in (None, AUTO) and pooling.max_seq_len is not None:
        longest = min(pooling.max_seq_len, model_config.max_model_len)
        config = config.with_value("max_model_len", longest, source="model")
    wanted = config.model.max_model_len
    longest = wanted if isinstance(wanted, int) else model_config.max_model_len
    given = config.scheduler.max_num_batched_tokens
    if pooling.needs_whole and given is not None and given < longest:
        raise ConfigError(
            f"--max-num-batched-tokens is {given}; this model computes an input of up to {longest} "
            f"tokens in one step: raise it to {longest}, or lower --max-model-len."
        )
    return config


def answer_parsers(
    registry: Registry, *, tool_call: str | None, reasoning: str | None
) -> tuple[type[ToolCallParser] | None, type[ReasoningParser] | None]:
    """Return the parsers that are asked for by name. Raises: ConfigError, PluginError."""
    return (
        None if tool_call is None else require_tool_call_parser(registry, tool_call),
        None if reasoning is None else require_reasoning_parser(registry, reasoning),
    )


@contextlib.contextmanager
def _naming(path: Path, key: str) -> Iterator[None]:
    """Put file and key before an error that does not name the file yet."""
    try:
        yield
    except ConfigError as error:
        if str(path) in str(error):
            raise
        raise ConfigError(f"{path}: {key}: {error}") from error


def _check_attention_options(config: EngineConfig, registry: Registry) -> None:
    """Check the options of backends that are asked for by name; `auto` is known only later."""
    names = parts_asked_for(config.plugins.attention_backend)
    if AUTO not in names.values():
        used = [registry.attention(name) for name in names.values()]
        parse_attention_options(registry, used, config.plugins.attention_option)


def _refuse_remote_code(raw: dict[str, Any], path: Path, *, trusted: bool) -> None:
    if raw.get("auto_map") and not trusted:
        raise ConfigError(
            f"{path}: key 'auto_map' asks for code that the checkpoint carries, which is not run "
            "unasked. Remove the key, or pass --trust-remote-code: Quire's own implementation is "
            "then used where there is one, as here, and the checkpoint's code where there is none."
        )


def _remote_code(raw: dict[str, Any], *, trusted: bool) -> RemoteCode:
    auto_map = raw.get("auto_map")
    if not isinstance(auto_map, dict) or "AutoModelForCausalLM" not in auto_map:
        return RemoteCode.NONE
    return RemoteCode.TRUSTED if trusted else RemoteCode.DISTRUSTED


def _quant_method(raw: dict[str, Any], path: Path) -> str | None:
    found = raw.get("quantization_config")
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else None
    if not isinstance(method, str):
        raise ConfigError(f"{path}: key 'quantization_config' has no text 'quant_method'.")
    kind = found.get("format")
    return f"{method}:{kind}" if isinstance(kind, str) else method


def _with_dtype(
    config: EngineConfig, model_config: ModelConfig, checkpoint: Checkpoint
) -> EngineConfig:
    """Replace dtype `auto` by the one that config.json, or else the weights, are in."""
    if config.model.dtype != "auto":
        return config
    dtype = model_config.dtype
    if dtype is None:
        dtypes = [_SAFETENSORS_DTYPES.get(t.dtype) for t in checkpoint.tensors.values()]
        dtype = next((name for name in dtypes if name), "float32")
    return config.with_value("dtype", dtype, source="model")


def _with_kv_format(config: EngineConfig, raw: dict[str, Any]) -> EngineConfig:
    """Replace the KV cache's format `auto` where the checkpoint asks for one."""
    if config.cache.kv_cache_dtype != "auto":
        return config
    asked = kv_format_of(raw.get("quantization_config"))
    return config if asked is None else config.with_value("kv_cache_dtype", asked, source="model")


def _warnings_of_scales(config: EngineConfig, checkpoint: Checkpoint) -> list[str]:
    is_quantized = config.kv_dtype in KV_FORMATS.values()
    is_chosen = config.cache.kv_cache_dtype != "auto"
    if not is_quantized and not is_chosen and any(map(is_scale, checkpoint.tensors)):
        return [
            "the checkpoint has scales of an fp8 KV cache, which nobody reads: config.json does "
            "not ask for one. --kv-cache-dtype fp8 uses them."
        ]
    if not is_quantized or config.cache.kv_cache_scales != "unit":
        return []
    return [
        "--kv-cache-scales unit: keys and values beyond the range of an fp8 number are clipped, "
        "and small ones lose precision; auto takes scales that fit."
    ]


def _warnings(config: EngineConfig, checkpoint: Checkpoint, *, has_cache: bool) -> list[str]:
    """Return what the user should know of the KV cache, also of one that an encoder has not."""
    if has_cache:
        return _warnings_of_scales(config, checkpoint)
    names = ("block_size", "enable_prefix_caching", "kv_cache_dtype", "kv_cache_memory_bytes")
    idle = [option_name(name) for name in names if config.source(name) == "user"]
    if not idle:
        return []
    return [f"{', '.join(idle)}: an encoder keeps no keys and values, so that it changes nothing."]


def _check_lengths(
    config: EngineConfig, model_config: ModelConfig, raw: dict[str, Any], *, has_cache: bool
) -> None:
    wanted = config.model.max_model_len
    if isinstance(wanted, int) and wanted > model_config.longest_model_len:
        raise ConfigError(
            f"--max-model-len is {wanted}; this model reaches {model_config.longest_model_len} "
            "(max_position_embeddings and RoPE scaling in config.json)."
        )
    given = config.cache.kv_cache_memory_bytes
    if given is None or not has_cache or _may_have_windows(raw):
        return  # with windows it depends on the layers, which are not built yet
    # The layout is the backend's business; this is the least that any of them needs.
    element = DTYPE_BYTES[config.kv_dtype]
    size_kv_cache(
        kv_request(
            config,
            model_config,
            available_bytes=given,
            bytes_per_block=config.cache.block_size * model_config.kv_elements_per_token * element,
        )
    )


def _may_have_windows(raw: dict[str, Any]) -> bool:
    """Whether config.json, or its part for text, names a window that layers may use."""
    text = raw.get("text_config")
    given = {**raw, **text} if isinstance(text, dict) else raw
    if given.get("use_sliding_window") is False:
        return False
    return any(value and "window" in key for key, value in given.items())


def kv_request(
    config: EngineConfig,
    model_config: ModelConfig,
    *,
    available_bytes: int,
    bytes_per_block: int,
) -> KVRequest:
    """Return what the configuration asks of the KV cache."""
    return KVRequest(
        available_bytes=available_bytes,
        bytes_per_block=bytes_per_block,
        block_size=config.cache.block_size,
        max_num_seqs=config.scheduler.max_num_seqs,
        wanted_len=config.model.max_model_len,
        model_len=model_config.max_model_len,
        max_step_tokens=config.scheduler.max_num_batched_tokens or 1,
    )
