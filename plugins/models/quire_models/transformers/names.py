"""Names that files have instead of the class's own, as Transformers' table of them says."""

from __future__ import annotations

from typing import Any

# Tensors of old checkpoints that hold nothing to load.
IGNORED = (r".*\.rotary_emb\.inv_freq", r".*\.attn\.(bias|masked_bias)")


def aliases(net: Any) -> dict[str, str]:
    """Return regular expressions of files' names and what replaces them.

    Rules that do more than rename are left out: their tensors are then missing, by name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    found: dict[str, str] = {}
    for rule in get_model_conversion_mapping(net):
        is_plain = type(rule).__name__ in ("WeightRenaming", "PrefixChange")
        if not is_plain or len(rule.target_patterns) != 1 or getattr(rule, "scope_prefix", None):
            continue
        [target] = rule.target_patterns
        for number, source in enumerate(rule.source_patterns):
            ends = r"(?!\w)" if source[-1:].isalnum() else ""
            pattern = source.replace("*.", r".*\.") + ends
            if r"\2" not in target and number < 9:
                found[pattern] = target.replace("\\.", ".")
    return found
