"""Descriptors: what a plugin's entry-point module hands over. Never imports torch.

A descriptor says what there is and where its class lives (`load="module:Class"`); the class, and
with it torch, Triton or a vendor package, is imported only when the plugin is chosen.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from attrs import Factory, define, field, frozen

from quire.errors import PluginError
from quire.interfaces.model_config import ModelConfig

API_VERSION: tuple[int, int] = (1, 0)
"""Version of the hook specifications and of everything in `quire.interfaces`.

A plugin module declares the version it was written for as `QUIRE_API_VERSION`. Another major
number is refused, and so is a newer minor one.
"""

_MODEL_TASKS = ("generate", "embed", "classify")

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_OPTION = re.compile(r"[A-Za-z_]\w*")
_LOAD = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def _always_usable() -> None:
    return None


def _always_built() -> bool:
    return True


def _check_name(_instance: object, _attribute: Any, value: str) -> None:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise PluginError(
            f"plugin name {value!r} is not allowed; use lower-case letters, digits, '-', '_', '.'."
        )


def _check_load(_instance: object, _attribute: Any, value: str) -> None:
    if not isinstance(value, str) or not _LOAD.fullmatch(value):
        raise PluginError(f"load={value!r} does not name a class; write it as 'module:Class'.")


def _check_function(_instance: object, attribute: Any, value: str | None) -> None:
    if value is not None and not (isinstance(value, str) and _LOAD.fullmatch(value)):
        raise PluginError(
            f"{attribute.name}={value!r} does not name a function; write 'module:function'."
        )


def _check_quantizer(_instance: object, _attribute: Any, value: str | None) -> None:
    if value is not None and not (isinstance(value, str) and _LOAD.fullmatch(value)):
        raise PluginError(f"quantizer={value!r} does not name a class; write 'module:Class'.")


def _check_summary(_instance: object, _attribute: Any, value: str) -> None:
    if not isinstance(value, str) or "\n" in value:
        raise PluginError(f"summary={value!r} is not allowed; write one line of text.")


def _check_callable(_instance: object, attribute: Any, value: Any) -> None:
    if not callable(value):
        raise PluginError(f"{attribute.name}={value!r} cannot be called; give a function.")


def _to_names(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_names(_instance: object, attribute: Any, value: Any) -> None:
    if not isinstance(value, tuple) or not all(isinstance(v, str) and v for v in value):
        raise PluginError(
            f"{attribute.name}={value!r} is not a tuple of names; write it as ('name',)."
        )


def _check_task(_instance: object, _attribute: Any, value: Any) -> None:
    if value not in _MODEL_TASKS:
        raise PluginError(f"task={value!r} is not allowed; use one of {', '.join(_MODEL_TASKS)}.")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_integer(_instance: object, attribute: Any, value: object) -> None:
    if not _is_integer(value):
        raise PluginError(f"{attribute.name}={value!r} is not a whole number.")


def _check_priorities(_instance: object, attribute: Any, value: Any) -> None:
    is_table = isinstance(value, Mapping)
    if not is_table or not all(isinstance(d, str) and _is_integer(p) for d, p in value.items()):
        raise PluginError(
            f"{attribute.name}={value!r} does not map devices to whole numbers; "
            f"write it as {{'cuda': 50}}."
        )


@frozen(kw_only=True)
class Descriptor:
    """What every kind of plugin declares.

    `name` is unique within its kind. `why_unusable()` answers for this machine, without torch:
    None, or the reason in a sentence. `summary` is one line for `quire plugins`.

    A plugin with code to compile names in `build` what `quire build NAME` calls:
    `build(progress: Callable[[str], None]) -> str` reports lines and returns what is there now, in
    one line. Raises: BuildError with the compiler's own first error. `is_built()` answers without
    torch, within milliseconds. `auto` passes over what is not built; what is asked for by name is
    built at the start. What is not built and cannot be built here is unusable, and
    `why_unusable()` says so. With `builds_in_background`, a start that passed it over builds it
    at the lowest priority for the next start: for what takes seconds and little memory.
    """

    name: str = field(validator=_check_name)
    load: str = field(validator=_check_load)
    summary: str = field(default="", validator=_check_summary)
    why_unusable: Callable[[], str | None] = field(
        default=_always_usable, validator=_check_callable
    )
    build: str | None = field(default=None, validator=_check_function)
    is_built: Callable[[], bool] = field(default=_always_built, validator=_check_callable)
    builds_in_background: bool = False

    def __attrs_post_init__(self) -> None:
        """Refuse what would have no effect. Raises: PluginError."""
        if self.build is None and (self.is_built is not _always_built or self.builds_in_background):
            raise PluginError(
                f"plugin {self.name!r} sets is_built or builds_in_background without build; "
                f"name the function that builds it as build='module:function'."
            )

    def load_class(self) -> type:
        """Import and return the class. Raises: PluginError naming the plugin and the cause."""
        found = self._loaded(self.load)
        if not isinstance(found, type):
            raise PluginError(f"plugin {self.name!r}: {self.load!r} is not a class.")
        return found

    def load_build(self) -> Callable[[Callable[[str], None]], str] | None:
        """Import and return the function that builds it, None where nothing needs building.

        Raises: PluginError naming the plugin and the cause.
        """
        if self.build is None:
            return None
        found = self._loaded(self.build)
        if not callable(found):
            raise PluginError(f"plugin {self.name!r}: {self.build!r} is not a function.")
        return found  # type: ignore[no-any-return]

    def _loaded(self, place: str) -> Any:
        module, _, name = place.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except Exception as error:
            raise PluginError(
                f"plugin {self.name!r}: cannot load {place!r}: "
                f"{type(error).__name__}: {error}. Reinstall its package or disable it."
            ) from error


@frozen(kw_only=True)
class PluginOption:
    """One option of a backend, for `--attention-option NAME.key=value`.

    `parse` turns the text into a value and raises ValueError for a bad one.
    """

    meaning: str
    default: Any
    parse: Callable[[str], Any] = field(validator=_check_callable)


def _check_options(_instance: object, _attribute: Any, value: Any) -> None:
    is_table = isinstance(value, Mapping)
    if not is_table or not all(
        isinstance(key, str) and _OPTION.fullmatch(key) and isinstance(option, PluginOption)
        for key, option in value.items()
    ):
        raise PluginError(
            f"options={value!r} does not map names (letters, digits, '_') to PluginOption."
        )


def _check_config_class(_instance: object, _attribute: Any, value: Any) -> None:
    if not (isinstance(value, type) and issubclass(value, ModelConfig)):
        raise PluginError(f"config_class={value!r} is not a subclass of ModelConfig.")


@frozen(kw_only=True)
class AttentionPlugin(Descriptor):
    """Declare an attention backend; `load` names a subclass of `attention.AttentionBackend`.

    `priority[device]` orders `auto` on that kind of device, highest first; a device that is not
    listed is never chosen by `auto`.
    """

    priority: Mapping[str, int] = field(factory=dict, validator=_check_priorities)
    options: Mapping[str, PluginOption] = field(factory=dict, validator=_check_options)


@frozen(kw_only=True)
class QuantizationPlugin(Descriptor):
    """Declare a quantization method; `load` names a `quantization.QuantizationMethod`.

    `formats` are the values of `quantization_config.quant_method` that it claims, or
    "quant_method:format" where one of them comes in several, told apart by the key `format`.
    `quantizer`, "module:Class", names a `quantization.WeightQuantizer` that writes a format:
    what `quire quantize --method NAME` uses.
    """

    formats: tuple[str, ...] = field(default=(), converter=_to_names, validator=_check_names)
    priority: int = field(default=0, validator=_check_integer)
    on_the_fly: bool = False
    quantizer: str | None = field(default=None, validator=_check_quantizer)

    def load_quantizer(self) -> type | None:
        """Import and return the class that writes a format, None where it writes none.

        Raises: PluginError naming the plugin and the cause.
        """
        if self.quantizer is None:
            return None
        found = self._loaded(self.quantizer)
        if not isinstance(found, type):
            raise PluginError(f"plugin {self.name!r}: {self.quantizer!r} is not a class.")
        return found

    def reads(self, quant_method: str) -> bool:
        """Answer whether it claims "quant_method" or "quant_method:format"."""
        return not {quant_method, quant_method.partition(":")[0]}.isdisjoint(self.formats)


@frozen(kw_only=True)
class ModelPlugin(Descriptor):
    """Declare a model; `load` names a subclass of `model.Model`.

    `architectures` are the claims, as config.json spells them; among several plugins that claim
    one, priority settles it. `config_class` declares the config's keys. `also` names a function,
    "module:function", which answers of an architecture that nobody claims whether it can be built.
    `task` is what its architectures are for: "generate", "embed" or "classify". What generates
    can be asked to embed. `runs_remote_code`: it builds what nobody claims from the code that a
    checkpoint carries (`auto_map` in config.json), where a user trusts it.
    """

    architectures: tuple[str, ...] = field(converter=_to_names, validator=_check_names)
    config_class: type[ModelConfig] = field(validator=_check_config_class)
    priority: int = field(default=0, validator=_check_integer)
    also: str | None = field(default=None, validator=_check_function)
    task: str = field(default="generate", validator=_check_task)
    runs_remote_code: bool = False

    def builds(self, architecture: str) -> bool:
        """Answer whether it claims the architecture or, asked, can build it all the same.

        Raises: PluginError where `also` cannot be loaded.
        """
        if architecture in self.architectures:
            return True
        return self.also is not None and bool(self._loaded(self.also)(architecture))


@frozen(kw_only=True)
class CheckpointPlugin(Descriptor):
    """Declare a checkpoint that ships inside a package, so that `MODEL` may be its name.

    `load` names the package and its folder: "package:folder".
    """


@frozen(kw_only=True)
class SamplerPlugin(Descriptor):
    """Declare a sampler; `load` names a subclass of `sampling.Sampler`."""

    priority: Mapping[str, int] = field(factory=dict, validator=_check_priorities)


@frozen(kw_only=True)
class LogitsProcessorPlugin(Descriptor):
    """Declare a logits processor; `load` names a subclass of `sampling.LogitsProcessor`."""


@frozen(kw_only=True)
class ToolCallParserPlugin(Descriptor):
    """Declare a tool-call parser; `load` names an `answer_parsing.ToolCallParser`."""


@frozen(kw_only=True)
class ReasoningParserPlugin(Descriptor):
    """Declare a reasoning parser; `load` names an `answer_parsing.ReasoningParser`."""


@frozen(kw_only=True)
class GrammarPlugin(Descriptor):
    """Declare a grammar engine; `load` names a subclass of `grammar.GrammarEngine`.

    `auto` takes the highest priority among those that can be used.
    """

    priority: int = field(default=0, validator=_check_integer)


@define(kw_only=True)
class Selection:
    """How one plugin was chosen: requested -> used, why, and what was passed over and why.

    `unbuilt` are those of `passed_over` that would have been used, or asked, were they built.
    """

    kind: str
    requested: str
    used: str
    why: str
    passed_over: list[tuple[str, str]] = Factory(list)
    unbuilt: list[str] = Factory(list)
