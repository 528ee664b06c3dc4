"""What compressed-tensors writes into `quantization_config`, whatever the format of the weights.

Shared by the methods of this package; not a plugin. A format is read by the plugin that claims
"compressed-tensors:FORMAT". Never imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from quire.errors import ConfigError
from quire_quant.config_values import REMEDY
from quire_quant.module_names import is_target, names_in

QUANT_METHOD = "compressed-tensors"
WHERE = f"quantization_config ({QUANT_METHOD})"


@frozen(kw_only=True)
class Group:
    """Layers that are kept alike: how `weights`, and activations unless None, are quantized."""

    name: str
    targets: tuple[str, ...]
    weights: Mapping[str, Any]
    activations: Mapping[str, Any] | None


@frozen(kw_only=True)
class CompressedTensors:
    """The groups in their order, and the layers that no group has."""

    groups: tuple[Group, ...]
    ignored: tuple[str, ...]

    def group_of(self, module: str) -> Group | None:
        """Return how the linear layer of this name is kept; None: in the model's dtype.

        A group that names it comes before one of its class, whatever their order.
        """
        if is_target(module, self.ignored):
            return None
        for kind in (None, "Linear"):
            for group in self.groups:
                if is_target(module, group.targets, kind=kind):
                    return group
        return None


def read_groups(config: Mapping[str, Any], formats: tuple[str, ...]) -> CompressedTensors:
    """Read the configuration of a checkpoint in one of `formats`.

    Raises: ConfigError for another format, or what is malformed.
    """
    _check_format(config.get("format"), formats)
    sparsity = config.get("sparsity_config") or {"format": "dense"}
    if config.get("transform_config") or sparsity.get("format") != "dense":
        raise ConfigError(
            f"{WHERE}: transform_config and sparsity_config are not served; take a checkpoint that "
            "was quantized alone."
        )
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ConfigError(f"{WHERE}: config_groups is {groups!r}, not groups by their names.")
    read = tuple(_group(name, group, formats) for name, group in groups.items())
    return CompressedTensors(groups=read, ignored=names_in(config, "ignore"))


def _check_format(found: Any, formats: tuple[str, ...]) -> None:
    if found not in formats:
        raise ConfigError(
            f"{WHERE}: format is {found!r}; this method reads {', '.join(map(repr, formats))}. "
            "`quire plugins` lists what reads others."
        )


def _group(name: str, group: Any, formats: tuple[str, ...]) -> Group:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ConfigError(f"{WHERE}: config_groups.{name} says nothing of `weights`.")
    if group.get("format") is not None:
        _check_format(group["format"], formats)
    activations = group.get("input_activations")
    if activations is not None and not isinstance(activations, Mapping):
        raise ConfigError(f"{WHERE}: config_groups.{name}.input_activations is {activations!r}.")
    if group.get("output_activations") is not None:
        raise ConfigError(
            f"{WHERE}: config_groups.{name} quantizes output_activations, which no method does."
        )
    targets = names_in(group, "targets")
    return Group(name=name, targets=targets, weights=weights, activations=activations)


def expect(
    numbers: Mapping[str, Any], reader: str, where: str, key: str, allowed: tuple[Any, ...]
) -> Any:
    """Return a value that must be one of those allowed. Raises: ConfigError naming the key."""
    found = numbers.get(key)
    # 1 == True, and lists cannot be looked up in sets.
    if not any(found == one and type(found) is type(one) for one in allowed):
        listed = " or ".join(repr(one) for one in allowed if one is not None)
        raise ConfigError(
            f"{where}: {key} is {found!r}; {reader} reads {listed or 'checkpoints without it'}. "
            f"{REMEDY}"
        )
    return found


def written_config(
    form: str,
    weights: Mapping[str, Any],
    activations: Mapping[str, Any] | None,
    ignored: Sequence[str],
) -> dict[str, Any]:
    """Return a `quantization_config` in which all linears but those ignored are kept alike."""
    number = {"dynamic": False, "actorder": None, "block_structure": None, "group_size": None}
    group = {
        "format": form,
        "targets": ["Linear"],
        "weights": {**number, **weights},
        "input_activations": None if activations is None else {**number, **activations},
        "output_activations": None,
    }
    return {
        "quant_method": QUANT_METHOD,
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
