"""What compressed-tensors' `int-quantized` says of each layer. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from quire.errors import ConfigError
from quire_quant import compressed
from quire_quant.config_values import group_size_of

FORMAT = "int-quantized"
READER = "int8"


@frozen(kw_only=True)
class Scheme:
    """How one projection is kept, and what becomes of its inputs.

    `weight`: one scale a "tensor", a "channel" or a "group" of `group_size` inputs. `inputs`:
    "token", one scale a row; "static", one that the checkpoint gives, with a zero point unless
    `has_symmetric_inputs`; "plain", as they are.
    """

    weight: str
    inputs: str
    group_size: int | None = None
    has_symmetric_inputs: bool = True


def read_schemes(
    config: Mapping[str, Any],
) -> tuple[compressed.CompressedTensors, dict[str, Scheme]]:
    """Return the groups of a `quantization_config` and their schemes by name.

    Raises: ConfigError naming the key.
    """
    read = compressed.read_groups(config, (FORMAT,))
    return read, {group.name: read_scheme(group) for group in read.groups}


def read_scheme(group: compressed.Group) -> Scheme:
    """Read one group. Raises: ConfigError naming the key."""
    where = f"{compressed.WHERE}: config_groups.{group.name}.weights"
    weights, activations = group.weights, group.activations
    _check_number(weights, where)
    compressed.expect(weights, READER, where, "dynamic", (False, None))
    compressed.expect(weights, READER, where, "symmetric", (True, None))
    has_groups = activations is None
    allowed = ("channel", "tensor", "group") if has_groups else ("channel", "tensor")
    strategy = compressed.expect(weights, READER, where, "strategy", allowed)
    if activations is None:
        size = group_size_of(weights, ("group_size",)) if strategy == "group" else None
        order = weights.get("actorder")
        if order in ("group", "dynamic"):
            raise ConfigError(f"{where}: actorder is {order!r}, which {FORMAT} has no tensor for.")
        return Scheme(weight=strategy, inputs="plain", group_size=size)
    where = where.replace(".weights", ".input_activations")
    _check_number(activations, where)
    is_dynamic = compressed.expect(activations, READER, where, "dynamic", (True, False, None))
    kind = "token" if is_dynamic else "tensor"
    compressed.expect(activations, READER, where, "strategy", (kind,))
    allowed_symmetry = (True,) if is_dynamic else (True, False)
    symmetric = compressed.expect(activations, READER, where, "symmetric", allowed_symmetry)
    inputs = "token" if is_dynamic else "static"
    return Scheme(weight=strategy, inputs=inputs, has_symmetric_inputs=symmetric)


def _check_number(numbers: Mapping[str, Any], where: str) -> None:
    compressed.expect(numbers, READER, where, "num_bits", (8,))
    compressed.expect(numbers, READER, where, "type", ("int",))
