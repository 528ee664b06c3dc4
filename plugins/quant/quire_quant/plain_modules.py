"""Modules that a checkpoint has in full precision though its configuration does not say so.

Shared by the methods of this package that read `qweight`; not a plugin.
"""

from __future__ import annotations

import functools

from quire.interfaces.quantization import EmbeddingSpec, LinearSpec, QuantizationMethod
from quire_quant.module_names import is_router, part_names


class PackedMethod(QuantizationMethod):
    """A method whose tools leave more alone than they write down: the file tells."""

    @functools.cached_property
    def _has_packed(self) -> bool:
        # Else the whole file would be in full precision, and the configuration another's.
        return any(name.endswith(".qweight") for name in self.stored)

    def is_left_alone(self, module: str, spec: LinearSpec | EmbeddingSpec) -> bool:
        """Answer whether the file has a module, of a layer, in full precision.

        Without a file routers are so, which are one product with nothing else.
        """
        if not self.stored:
            return is_router(module) and len(part_names(spec)) == 1
        return self._has_packed and self.is_plain(module)
