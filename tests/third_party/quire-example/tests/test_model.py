"""The model keeps its contract: Quire's conformance kit says so."""

from __future__ import annotations

from quire.testing import ModelTests
from quire_example.config import ExampleConfig
from quire_example.model import ExampleForCausalLM


class TestExampleForCausalLM(ModelTests):
    """Transformers has no such class, so nobody but the kit judges it."""

    model = ExampleForCausalLM
    config_class = ExampleConfig
    architecture = "ExampleForCausalLM"
