"""A decoder's plugins beside the one that generates: for its bare body, and for a score head."""

from __future__ import annotations

from attrs import evolve

from quire.interfaces.plugin import ModelPlugin


def pooling_plugins(plugin: ModelPlugin, family: str) -> list[ModelPlugin]:
    """Return those of a family whose classes in Transformers begin with `family`.

    The class with a score head is called as `plugin.load`, with `Classifier` behind it.
    """
    return [
        evolve(
            plugin,
            name=f"{plugin.name}-embedding",
            architectures=(f"{family}Model",),
            task="embed",
            summary=f"{family} without a head: vectors of texts",
        ),
        evolve(
            plugin,
            name=f"{plugin.name}-classifier",
            load=f"{plugin.load}Classifier",
            architectures=(f"{family}ForSequenceClassification",),
            task="classify",
            summary=f"{family} with a head for classes, or for how well texts fit",
        ),
    ]
