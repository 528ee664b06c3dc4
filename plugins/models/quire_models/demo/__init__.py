"""The demo checkpoints, which ship in the wheel, and the scripts that trained them."""

from quire import hookimpl
from quire.interfaces.plugin import CheckpointPlugin

QUIRE_API_VERSION = (1, 0)


@hookimpl
def quire_checkpoints() -> list[CheckpointPlugin]:
    """Offer `demo` and its draft."""
    return [
        CheckpointPlugin(
            name="demo",
            load="quire_models.demo:model",
            summary="takes coffee orders, with or without tools; 6 M parameters",
        ),
        CheckpointPlugin(
            name="demo-draft",
            load="quire_models.demo:draft",
            summary="a draft for `demo` with the same tokenizer; 1 M parameters",
        ),
    ]
