"""Model `phi3`: Phi-3 mini and medium, Phi-4 and Phi-4 mini."""

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from quire import hookimpl
from quire.interfaces.model_config import absent, end_tokens, real, refuse, whole
from quire.interfaces.plugin import ModelPlugin
from quire.interfaces.rope import RopeParameters, rope_key
from quire_models.decoder_config import DecoderConfig

QUIRE_API_VERSION = (1, 0)

ORIGINAL = "original_max_position_embeddings"
# What files say of two factors for each frequency.
TYPES = {"su": "longrope", "yarn": "longrope"}


def as_longrope(given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the keys with the names of today, and the original length that Phi-3 has."""
    found = {ORIGINAL: 4096, **given}
    for where in ("rope_scaling", "rope_parameters"):
        entries = found.get(where)
        for name in ("type", "rope_type"):
            if isinstance(entries, Mapping) and isinstance(entries.get(name), str):
                entries = {**entries, name: TYPES.get(entries[name], entries[name])}
        found[where] = entries
    return found


@frozen(kw_only=True)
class Phi3Config(DecoderConfig):
    """Keys of Phi3ForCausalLM, with the defaults of Transformers."""

    vocab_size: int = whole(32064, 1, 2**24)
    hidden_size: int = whole(3072, 1, 2**17)
    intermediate_size: int = whole(8192, 1, 2**20)
    max_position_embeddings: int = whole(4096, 1, 2**30)
    eos_token_ids: tuple[int, ...] = end_tokens(32000)
    rms_norm_eps: float = real(1e-5, 0.0, 1.0)
    rope: RopeParameters = rope_key(partial=True, adapt=as_longrope)  # noqa: RUF009
    sliding_window: int | None = whole(None, 1, 2**30, optional=True)
    attention_bias: bool | None = absent()
    mlp_bias: bool | None = absent()

    def check(self) -> None:
        """Check that the rotation is of a kind that Phi-3 has."""
        super().check()
        if self.rope.rope_type not in ("default", "longrope"):
            raise refuse(self.source, "rope_type", self.rope.rope_type, '"default", "longrope"')


@hookimpl
def quire_models() -> list[ModelPlugin]:
    """Offer `phi3`."""
    return [
        ModelPlugin(
            name="phi3",
            load="quire_models.phi3.model:Phi3",
            architectures=("Phi3ForCausalLM",),
            config_class=Phi3Config,
            summary="Phi-3, Phi-4 and Phi-4 mini",
        )
    ]
