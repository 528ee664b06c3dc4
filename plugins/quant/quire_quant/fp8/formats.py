"""What a `quantization_config` says of each layer: one reader a `quant_method`, without torch.

A reader returns how to find a layer's scheme by its name in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attrs import evolve, frozen

from quire.errors import ConfigError
from quire_quant import compressed
from quire_quant.config_values import REMEDY
from quire_quant.module_names import has_path, has_wildcard, names_in

MODELOPT_ALGORITHMS = ("FP8",)


@frozen(kw_only=True)
class Scheme:
    """How one projection is kept, and what becomes of its inputs.

    `weight`: one scale a "tensor", "channel" or "block". `inputs`: "token", one scale a row;
    "group", one a row and `block[1]` inputs; "static", one that the checkpoint gives; "plain", as
    they are. `largest`: beyond it inputs are clipped, where rows have scales.
    """

    weight: str
    inputs: str
    block: tuple[int, int] = (0, 0)
    scale_name: str = "weight_scale"
    largest: float | None = None


ON_THE_FLY = Scheme(weight="channel", inputs="token")


@frozen(kw_only=True)
class Format:
    """`scheme_of(name)` is None for a layer that is left alone; heads only with `has_heads`."""

    scheme_of: Callable[[str], Scheme | None]
    has_heads: bool = False


def read_config(config: Mapping[str, Any]) -> Format | None:
    """Return what a `quantization_config` says; None for {}: made out of full precision.

    Raises: ConfigError naming the key.
    """
    if not config:
        return None
    method = config.get("quant_method")
    reader = READERS.get(str(method))
    if reader is None:
        raise ConfigError(
            f"quantization_config: quant_method is {method!r}; fp8 reads {', '.join(READERS)}."
        )
    return reader(config)


def _read_hugging_face(config: Mapping[str, Any]) -> Format:
    where = "quantization_config (fp8)"
    _expect(config, where, "fmt", (None, "e4m3"))
    # With "ue8m0" scales are powers of two; those of inputs, made here, may be any float.
    _expect(config, where, "scale_fmt", (None, "float", "ue8m0"))
    activations = _expect(config, where, "activation_scheme", ("dynamic", "static"))
    block = config.get("weight_block_size")
    if block is not None:
        if activations == "static":
            raise ConfigError(
                f"{where}: activation_scheme is 'static' beside weight_block_size; blocks come "
                "with 'dynamic' alone."
            )
        size = _block(block, f"{where}: weight_block_size")
        scheme = Scheme(weight="block", inputs="group", block=size, scale_name="weight_scale_inv")
    else:
        scheme = Scheme(weight="tensor", inputs="token" if activations == "dynamic" else "static")
    return _all_but(scheme, names_in(config, "modules_to_not_convert", "ignored_layers"))


def _read_fbgemm(config: Mapping[str, Any]) -> Format:
    largest = config.get("activation_scale_ub", 1200.0)
    if isinstance(largest, bool) or not isinstance(largest, int | float) or not largest > 0:
        raise ConfigError(
            f"quantization_config (fbgemm_fp8): activation_scale_ub is {largest!r}, not a number "
            "above 0."
        )
    scheme = Scheme(weight="channel", inputs="token", largest=float(largest))
    return _all_but(scheme, names_in(config, "modules_to_not_convert"))


def _all_but(scheme: Scheme, excluded: tuple[str, ...]) -> Format:
    return Format(scheme_of=lambda name: None if has_path(name, excluded) else scheme)


def _read_modelopt(config: Mapping[str, Any]) -> Format:
    where = "quantization_config (modelopt)"
    inner = config.get("quantization", config)
    if not isinstance(inner, Mapping):
        raise ConfigError(f"{where}: quantization is {inner!r}, not an object.")
    _expect(inner, where, "quant_algo", MODELOPT_ALGORITHMS)
    excluded = names_in(inner, "exclude_modules", "ignore")
    scheme = Scheme(weight="tensor", inputs="static")
    return Format(
        scheme_of=lambda name: None if has_wildcard(name, excluded) else scheme, has_heads=True
    )


def _read_compressed_tensors(config: Mapping[str, Any]) -> Format:
    read = compressed.read_groups(config, ("float-quantized",))
    schemes = {group.name: _compressed_scheme(group) for group in read.groups}

    def scheme_of(name: str) -> Scheme | None:
        group = read.group_of(name)
        return None if group is None else schemes[group.name]

    return Format(scheme_of=scheme_of, has_heads=True)


def _compressed_scheme(group: compressed.Group) -> Scheme:
    where = f"{compressed.WHERE}: config_groups.{group.name}.weights"
    _check_number(group.weights, where)
    _expect(group.weights, where, "dynamic", (False, None))
    strategy = _expect(group.weights, where, "strategy", ("tensor", "channel", "block"))
    scheme = Scheme(weight=strategy, inputs="plain")
    if strategy == "block":
        structure = group.weights.get("block_structure")
        if isinstance(structure, str):
            structure = [int(n) if n.isdigit() else n for n in structure.split("x")]
        scheme = evolve(scheme, block=_block(structure, f"{where}: block_structure"))
    if group.activations is None:
        return scheme
    where = where.replace(".weights", ".input_activations")
    return evolve(scheme, inputs=_compressed_inputs(group.activations, where, scheme.block[1]))


def _compressed_inputs(activations: Mapping[str, Any], where: str, width: int) -> str:
    _check_number(activations, where)
    dynamic = _expect(activations, where, "dynamic", (True, False, None))
    if not dynamic:
        _expect(activations, where, "strategy", ("tensor",))
        return "static"
    strategy = _expect(activations, where, "strategy", ("token", "group"))
    if strategy == "token":
        return "token"
    if activations.get("group_size") != width:
        raise ConfigError(
            f"{where}: group_size is {activations.get('group_size')!r}; inputs in groups go with "
            f"weights in blocks of as many inputs, here {width or 'no blocks'}."
        )
    return "group"


def _check_number(numbers: Mapping[str, Any], where: str) -> None:
    _expect(numbers, where, "type", ("float",))
    _expect(numbers, where, "num_bits", (8,))
    _expect(numbers, where, "symmetric", (True, None))


def _expect(config: Mapping[str, Any], where: str, key: str, allowed: tuple[Any, ...]) -> Any:
    found = config.get(key)
    # 1 == True, and lists cannot be looked up in sets.
    if not any(found == one and type(found) is type(one) for one in allowed):
        listed = " or ".join(repr(one) for one in allowed if one not in (None, ""))
        raise ConfigError(
            f"{where}: {key} is {found!r}; fp8 reads {listed or 'checkpoints without it'}. {REMEDY}"
        )
    return found


def _block(found: Any, where: str) -> tuple[int, int]:
    is_pair = isinstance(found, list | tuple) and len(found) == 2
    if not is_pair or not all(type(n) is int and n > 0 for n in found):
        raise ConfigError(f"{where} is {found!r}; expected [outputs, inputs], such as [128, 128].")
    return found[0], found[1]


READERS: dict[str, Callable[[Mapping[str, Any]], Format]] = {
    "fp8": _read_hugging_face,
    "fbgemm_fp8": _read_fbgemm,
    "modelopt": _read_modelopt,
    compressed.QUANT_METHOD: _read_compressed_tensors,
}
