"""What each method costs `demo` on its validation dialogues: the table of docs/quantization.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quire.cli.main import main

VALIDATION = Path(__file__).parents[1] / "data/coffee_orders_valid.jsonl"
GROUPS = ["--group-size", "64"]
# Arguments of `quire quantize`, and the largest loss of perplexity; None: told, not bounded.
METHODS: dict[str, tuple[list[str], float | None]] = {
    "gptq": (GROUPS, 0.05),
    "awq": (GROUPS, 0.05),
    "int8": ([], 0.01),
    "fp8": ([], 0.01),
    "int4": (GROUPS, None),
}


def quality(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """Return the rows of `quire bench quality`, the baseline first."""
    capsys.readouterr()
    given = [*arguments, "--chat", str(VALIDATION), "--device", "cpu", "--json"]
    assert main(["bench", "quality", *given]) == 0
    return json.loads(capsys.readouterr().out)["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_quantized_demo_predicts_its_validation_dialogues_as_well(
    tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given, bound = METHODS[method]
    output = str(tmp_path / method)
    assert main(["quantize", "demo", "--method", method, "--output", output, *given]) == 0

    plain, found = quality(capsys, output, "--baseline", "demo")

    lost = found["perplexity"] / plain["perplexity"] - 1
    cells = [f"{found['perplexity']:.5f}", f"{lost:+.2%}"]
    cells += [f"{found[name]:.5f}" for name in ("accuracy", "agreement", "kl_divergence")]
    with capsys.disabled():
        print(f"\n| `{method}` | {' | '.join(cells)} |")
    assert found["tokens"] == 22_081
    assert found["kl_divergence"] > 0
    assert found["agreement"] > 0.97
    if bound is not None:
        assert lost < bound
