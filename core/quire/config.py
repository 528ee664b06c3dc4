"""The engine's configuration: one attrs field a setting, with meaning, unit, default and choices.

`OPTIONS` is the one table behind `LLM(...)` keywords, command-line options and `quire explain`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from attrs import Attribute, Factory, evolve, field, fields, frozen

from quire.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
DTYPE_ALIASES = {"half": "float16", "float": "float32"}  # as vLLM spells them too
# The formats of a quantized KV cache, as vLLM spells them, and what PyTorch calls them.
KV_FORMATS = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
KV_SCALES = ("auto", "calibrated", "unit")
DEVICES = ("auto", "cpu", "cuda")
POLICIES = ("fcfs", "priority")
TASKS = ("auto", "generate", "embed", "classify", "score", "pooling")
LOAD_FORMATS = ("auto", "safetensors", "dummy")

Check = Callable[[Any], bool]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest known name, or nothing."""
    spelled = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), list(spelled), n=1, cutoff=0.6)
    return f" Did you mean {spelled[close[0]]!r}?" if close else ""


def option_name(name: str) -> str:
    """Return how a setting is spelled on the command line."""
    return "--" + name.replace("_", "-")


def setting(
    default: Any, meaning: str, *, kind: type, allowed: str, check: Check, unit: str = ""
) -> Any:
    """Declare one setting; `check` answers whether a value is allowed, `allowed` says it."""

    def validate(_instance: object, attribute: Attribute[Any], value: Any) -> None:
        if not check(value):
            raise ConfigError(
                f"{option_name(attribute.name)} is {_short(value)}; allowed: {allowed}."
            )

    metadata = {"meaning": meaning, "unit": unit, "kind": kind, "allowed": allowed}
    return field(default=default, validator=validate, metadata=metadata)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def choice_setting(default: str, choices: tuple[str, ...], meaning: str) -> Any:
    """Declare a text out of a few."""
    listed = ", ".join(choices)

    def validate(_instance: object, attribute: Attribute[Any], value: Any) -> None:
        if not isinstance(value, str) or value not in choices:
            hint = nearest(str(value), choices)
            raise ConfigError(
                f"{option_name(attribute.name)} is {_short(value)}; allowed: {listed}.{hint}"
            )

    def without_alias(value: Any) -> Any:
        return DTYPE_ALIASES.get(value, value) if isinstance(value, str) else value

    metadata: dict[str, Any] = {"meaning": meaning, "unit": "", "kind": str, "allowed": listed}
    metadata["choices"] = choices
    return field(default=default, converter=without_alias, validator=validate, metadata=metadata)


def text_setting(default: str | None, meaning: str, *, optional: bool = False) -> Any:
    """Declare a text that is not empty."""

    def check(value: Any) -> bool:
        return (value is None and optional) or (isinstance(value, str) and value != "")

    return setting(default, meaning, kind=str, allowed="a text that is not empty", check=check)


def flag_setting(default: bool, meaning: str) -> Any:
    """Declare a switch."""

    def check(value: Any) -> bool:
        return isinstance(value, bool)

    return setting(default, meaning, kind=bool, allowed="true or false", check=check)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def count_setting(default: int | None, meaning: str, *, low: int, high: int, unit: str = "") -> Any:
    """Declare a whole number; optional where the default is None."""

    def check(value: Any) -> bool:
        return (value is None and default is None) or (_is_whole(value) and low <= value <= high)

    allowed = f"whole numbers from {low} to {high}"
    return setting(default, meaning, kind=int, allowed=allowed, check=check, unit=unit)


def fraction_setting(default: float, meaning: str) -> Any:
    """Declare a share above 0, up to 1."""

    def check(value: Any) -> bool:
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        return real and math.isfinite(value) and 0 < value <= 1

    return setting(
        default, meaning, kind=float, allowed="numbers above 0 up to 1", check=check, unit="share"
    )


def names_setting(meaning: str, *, allowed: str = "names") -> Any:
    """Declare a list of names."""

    metadata = {"meaning": meaning, "unit": "", "kind": tuple, "allowed": allowed}

    def validate(_instance: object, attribute: Attribute[Any], value: Any) -> None:
        for one in value if isinstance(value, tuple) else [value]:
            if not isinstance(one, str) or not one:
                # The others may be secret: API keys are such a list.
                name = option_name(attribute.name)
                raise ConfigError(f"{name} has {_short(one)}; allowed: {allowed}.")

    def to_tuple(value: Any) -> Any:
        if isinstance(value, str):
            return (value,)
        return tuple(value) if isinstance(value, (list, tuple, set, frozenset)) else value

    return field(default=(), converter=to_tuple, validator=validate, metadata=metadata)


def seconds_setting(default: float, meaning: str) -> Any:
    """Declare a span of time, above 0."""

    def check(value: Any) -> bool:
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        return real and math.isfinite(value) and value > 0

    allowed = "finite numbers above 0"
    return setting(default, meaning, kind=float, allowed=allowed, check=check, unit="seconds")


def _is_context_length(value: Any) -> bool:
    return value in (None, "auto") or (_is_whole(value) and 1 <= value <= 2**30)


def _is_block_size(value: Any) -> bool:
    return _is_whole(value) and 1 <= value <= 4096 and value & (value - 1) == 0


@frozen(kw_only=True)
class ModelOptions:
    """What to load."""

    model: str = text_setting("demo", "folder, Hugging Face id, or name of a bundled checkpoint")
    tokenizer: str | None = text_setting(
        None, "folder or id of the tokenizer, where it is not the model's own", optional=True
    )
    skip_tokenizer_init: bool = flag_setting(
        False, "load no tokenizer: prompts are token ids, and outputs have no text"
    )
    revision: str | None = text_setting(
        None, "branch, tag or commit of a Hugging Face id", optional=True
    )
    load_format: str = choice_setting(
        "auto", LOAD_FORMATS, "where weights come from; auto: safetensors; dummy: drawn at random"
    )
    dtype: str = choice_setting("auto", DTYPES, "number format of weights and activations")
    max_model_len: int | str | None = setting(
        None,
        "longest prompt and answer together; auto: the largest that fits; "
        "not given: the model's own",
        kind=int,
        allowed="auto, or whole numbers from 1",
        check=_is_context_length,
        unit="tokens",
    )
    chat_template: str | None = text_setting(
        None, "file with a chat template instead of the checkpoint's own", optional=True
    )
    task: str = choice_setting("auto", TASKS, "what for; pooling: embed or classify, as it can")
    pooling: str = text_setting(
        "auto", "how to embed: cls, mean, max, lasttoken and others; auto: as the checkpoint says"
    )
    trust_remote_code: bool = flag_setting(
        False, "run code that a checkpoint carries, where nobody else builds its model"
    )


@frozen(kw_only=True)
class CacheOptions:
    """How the KV cache is sized and shared."""

    block_size: int = setting(
        16,
        "tokens in one KV block",
        kind=int,
        allowed="powers of two from 1 to 4096",
        check=_is_block_size,
        unit="tokens",
    )
    kv_cache_memory_bytes: int | None = count_setting(
        None, "memory for KV blocks; not given: measured", low=1, high=2**50, unit="bytes"
    )
    gpu_memory_utilization: float = fraction_setting(
        0.9, "share of the GPU's memory that the engine may use in all"
    )
    kv_cache_dtype: str = choice_setting(
        "auto",
        (*DTYPES, *KV_FORMATS),
        "number format of the KV cache; auto: as the checkpoint's quantization asks, else as dtype",
    )
    kv_cache_scales: str = choice_setting(
        "auto",
        KV_SCALES,
        "scales of an fp8 KV cache; auto: the checkpoint's, else calibrated by a short run at the "
        "start; unit: 1",
    )
    enable_prefix_caching: bool = flag_setting(
        True, "find the blocks of equal prompt beginnings again"
    )


@frozen(kw_only=True)
class SchedulerOptions:
    """How requests share the steps."""

    max_num_seqs: int = count_setting(
        256, "sequences that may run at once", low=1, high=65536, unit="sequences"
    )
    max_num_batched_tokens: int | None = count_setting(
        None,
        "tokens computed in one step; not given: 2048, on a GPU 8192",
        low=1,
        high=2**20,
        unit="tokens",
    )
    scheduling_policy: str = choice_setting(
        "fcfs", POLICIES, "fcfs: by arrival; priority: lower numbers first, waiting ages"
    )
    priority_aging_s: float = seconds_setting(
        10.0, "waiting time that improves a request's priority by one"
    )


@frozen(kw_only=True)
class PluginOptions:
    """Which plugins do the work. `auto` picks by priority among the usable ones."""

    attention_backend: str = text_setting(
        "auto", "attention backend by name, or prefill=NAME,decode=NAME: two on one KV cache"
    )
    attention_option: tuple[str, ...] = names_setting(
        "NAME.key=value for an attention backend", allowed="NAME.key=value"
    )
    skip_self_check: bool = flag_setting(
        False, "start without comparing the attention backend with float64 on a small case"
    )
    quantization: str | None = text_setting(
        None, "quantization method by name; not given: as the checkpoint says", optional=True
    )
    model_implementation: str = text_setting("auto", "model plugin by name")
    sampler: str = text_setting("auto", "sampler plugin by name")
    logits_processors: tuple[str, ...] = names_setting("logits processors to load, by name")
    grammar_backend: str = text_setting("auto", "grammar engine by name")
    disable_plugin: tuple[str, ...] = names_setting(
        "plugins that are not loaded, by entry-point name"
    )


@frozen(kw_only=True)
class DeviceOptions:
    """Where and how to compute."""

    device: str = choice_setting("auto", DEVICES, "auto: a GPU where there is one")
    tensor_parallel_size: int = count_setting(
        1, "GPUs that share the model; one in this version", low=1, high=1
    )
    enforce_eager: bool = flag_setting(False, "never use CUDA graphs")
    deterministic: bool = flag_setting(
        False, "a request's logits have the same bits whatever runs beside it; slower"
    )
    seed: int = count_setting(0, "where seeds of unseeded requests start", low=0, high=2**63 - 1)
    num_threads: int | None = count_setting(
        None, "compute threads on a CPU; not given: PyTorch's", low=1, high=1024
    )


@frozen(kw_only=True)
class EngineConfig:
    """Every setting of one engine and who set it (`default`, `model` or `user`)."""

    model: ModelOptions = Factory(ModelOptions)
    cache: CacheOptions = Factory(CacheOptions)
    scheduler: SchedulerOptions = Factory(SchedulerOptions)
    plugins: PluginOptions = Factory(PluginOptions)
    device: DeviceOptions = Factory(DeviceOptions)
    sources: Mapping[str, str] = Factory(dict)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> EngineConfig:
        """Build from flat names as `LLM(...)` and the command line give them.

        Raises: ConfigError for an unknown name (with the nearest right one) or a bad value.
        """
        for name in options:
            if name not in OPTIONS:
                known = nearest(name, OPTIONS)
                raise ConfigError(
                    f"unknown option {name!r}.{known} `quire generate --help` lists all."
                )
        parts = {
            part: kind(**{a.name: options[a.name] for a in fields(kind) if a.name in options})
            for part, kind in PARTS.items()
        }
        return cls(**parts, sources=dict.fromkeys(options, "user"))

    def source(self, name: str) -> str:
        """Return who set the option: `default`, `model` or `user`."""
        return self.sources.get(name, "default")

    @property
    def kv_dtype(self) -> str:
        """Return what the KV cache holds, as PyTorch calls it; "auto" while dtype is not known."""
        given = self.cache.kv_cache_dtype
        return self.model.dtype if given == "auto" else KV_FORMATS.get(given, given)

    def value(self, name: str) -> Any:
        """Return the value of an option by its flat name."""
        return getattr(getattr(self, OPTIONS[name].part), name)

    def with_value(self, name: str, value: Any, *, source: str) -> EngineConfig:
        """Return a copy with one option set by `source`."""
        part = OPTIONS[name].part
        changed = evolve(getattr(self, part), **{name: value})
        return evolve(self, **{part: changed, "sources": {**self.sources, name: source}})

    def to_options(self) -> dict[str, Any]:
        """Return what the user set, by flat name: enough to build an equal one elsewhere."""
        return {n: self.value(n) for n, source in self.sources.items() if source == "user"}


@frozen(kw_only=True)
class Option:
    """One row of the option table."""

    name: str
    part: str
    default: Any
    kind: type
    meaning: str
    unit: str
    allowed: str
    choices: tuple[str, ...] | None


PARTS: dict[str, type] = {
    "model": ModelOptions,
    "cache": CacheOptions,
    "scheduler": SchedulerOptions,
    "plugins": PluginOptions,
    "device": DeviceOptions,
}


def option_rows(part: str, kind: type) -> dict[str, Option]:
    """Return the rows of one part's attrs class, by name."""
    rows = {}
    for a in fields(kind):
        meta = a.metadata
        rows[a.name] = Option(
            name=a.name,
            part=part,
            default=a.default,
            kind=meta["kind"],
            meaning=meta["meaning"],
            unit=meta["unit"],
            allowed=meta["allowed"],
            choices=meta.get("choices"),
        )
    return rows


OPTIONS: dict[str, Option] = {
    name: row for part, kind in PARTS.items() for name, row in option_rows(part, kind).items()
}
