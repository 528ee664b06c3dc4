"""What a GPTQ checkpoint's `quantization_config` says of each module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from attrs import evolve, frozen

from quire.errors import ConfigError
from quire_quant.config_values import flag_of, group_size_of, names_of, one_of, refuse, value_of

BITS = (2, 3, 4, 8)
# What is added to a stored zero point.
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}


@frozen(kw_only=True)
class ModuleSettings:
    """Bits and group size of one module; without a size all inputs are one group."""

    bits: int
    group_size: int | None


class GptqSettings:
    """Read the config once; answer for modules by their names.

    `dynamic` has regular expressions for names: "-:..." leaves a module alone, others override
    bits and group size. `modules_in_block_to_quantize` lists the ends of names; without it all
    linears are quantized. `lm_head` says whether the head is.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._common = ModuleSettings(
            bits=one_of(config, ("bits",), BITS),
            group_size=group_size_of(config, ("group_size",)),
        )
        # Where there is a `g_idx` it says it; without this none is needed.
        self.desc_act = flag_of(config, "desc_act", False)
        flag_of(config, "sym", True)
        written = value_of(config, ("checkpoint_format", "format"), "gptq")
        if not isinstance(written, str) or written not in ZERO_OFFSETS:
            raise refuse("checkpoint_format", written, "'gptq' or 'gptq_v2'")
        self.zero_offset = ZERO_OFFSETS[written]
        if flag_of(config, "is_marlin_format", False):
            raise refuse("is_marlin_format", True, "false")
        one_of({"pack_dtype": "int32", **config}, ("pack_dtype",), ("int32",))
        self.has_head = flag_of(config, "lm_head", False)
        self._endings = self._endings_of(config)
        self._dynamic = self._dynamic_of(config)

    @staticmethod
    def _endings_of(config: Mapping[str, Any]) -> tuple[str, ...] | None:
        key = "modules_in_block_to_quantize"
        found = value_of(config, (key,))
        if found is None:
            return None
        if isinstance(found, list) and all(isinstance(one, list) for one in found):
            found = [name for one in found for name in one]
        return names_of({key: found}, key)

    def _dynamic_of(
        self, config: Mapping[str, Any]
    ) -> list[tuple[re.Pattern[str], ModuleSettings | None]]:
        given = value_of(config, ("dynamic",), {})
        if not isinstance(given, Mapping):
            raise refuse("dynamic", given, "an object of patterns")
        rules = []
        for pattern, changes in given.items():
            try:
                compiled = re.compile(pattern.removeprefix("+:").removeprefix("-:"))
            except re.error as error:
                raise refuse("dynamic", pattern, f"a regular expression ({error})") from None
            rules.append((compiled, self._changed(pattern, changes)))
        return rules

    def _changed(self, pattern: str, changes: Any) -> ModuleSettings | None:
        if pattern.startswith("-:"):
            return None
        if not isinstance(changes, Mapping):
            raise refuse(f"dynamic {pattern!r}", changes, "an object")
        settings = self._common
        if "bits" in changes:
            settings = evolve(settings, bits=one_of(changes, ("bits",), BITS))
        if "group_size" in changes:
            settings = evolve(settings, group_size=group_size_of(changes, ("group_size",)))
        return settings

    def of(self, name: str) -> ModuleSettings | None:
        """Return a module's settings, or None if it is left alone."""
        for pattern, settings in self._dynamic:
            if pattern.match(name):
                return settings
        if self._endings is None or name.endswith(self._endings):
            return self._common
        return None

    def of_head(self, name: str) -> ModuleSettings | None:
        """Return the head's settings, or None if it is left alone."""
        return self.of(name) if self.has_head else None


def only_settings(named: Mapping[str, ModuleSettings | None]) -> ModuleSettings | None:
    """Return what all parts of a fused layer have. Raises: ConfigError if they differ."""
    different = set(named.values())
    if len(different) == 1:
        return different.pop()
    words = "; ".join(f"{name}: {_words(settings)}" for name, settings in named.items())
    raise ConfigError(
        f"projections that are one product must be quantized alike ({words}). Take a checkpoint "
        f"whose `dynamic` treats them so."
    )


def _words(settings: ModuleSettings | None) -> str:
    if settings is None:
        return "left alone"
    return f"{settings.bits} bits, group_size {settings.group_size or -1}"
