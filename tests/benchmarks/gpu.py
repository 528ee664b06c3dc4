"""Set up, check and time on a machine with a GPU, in one call.

    python tests/benchmarks/gpu.py [PART ...] [--out FOLDER]

Parts: checks, kernels, attention, engine, start. Each command has a limit of its own, and what
fails does not keep the others from running. Models are shapes with random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
MODELS = {"qwen3-0.6b": QWEN3, "llama-3.1-8b": LLAMA}


def commands(part: str, folders: dict[str, str], out: Path) -> list[tuple[list[str], float]]:
    """Return a part's commands, each with its limit in seconds."""
    python = sys.executable
    bench = [python, "-m", "quire", "bench"]
    dummy = ["--load-format", "dummy"]
    small, large = folders["qwen3-0.6b"], folders["llama-3.1-8b"]
    here = ROOT / "tests/benchmarks"
    if part == "checks":
        gpu = [python, "-m", "pytest", "-q", "-x", "--no-header", "-m", "gpu"]
        gpu += ["tests/end_to_end/test_gpu.py", "tests/end_to_end/test_gpu_graphs.py"]
        units = [python, "-m", "pytest", "-q", "--no-header", "tests/kernels"]
        units += ["tests/plugins/attention", "tests/plugins/sampling"]
        return [(gpu, 200.0), (units, 150.0)]
    if part == "kernels":
        return [([python, str(here / "gpu_kernels.py")], 120.0)]
    if part == "attention":
        return [([python, str(here / "gpu_attention.py")], 150.0)]
    if part == "start":
        return [([*bench, "startup", large, *dummy, "--cache", "cold"], 120.0),
                ([*bench, "startup", large, *dummy, "--cache", "warm"], 90.0)]  # fmt: skip
    assert part == "engine", part
    profiles = ["--profile", str(out)]
    return [
        ([*bench, "latency", small, *dummy, *profiles], 90.0),
        ([*bench, "latency", large, *dummy, *profiles], 100.0),
        ([*bench, "offline", small, *dummy, *profiles], 100.0),
        ([*bench, "offline", large, *dummy, *profiles], 120.0),
        ([*bench, "prefill", large, *dummy], 80.0),
    ]


def main() -> None:
    """Run the parts that are asked for, all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folders = {}
        for model, config in MODELS.items():
            folder = Path(name) / model
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(config))
            folders[model] = str(folder)
        for part in given.parts or ["checks", "kernels", "attention", "engine", "start"]:
            for command, limit_s in commands(part, folders, given.out):
                run(command, limit_s)


def run(command: list[str], limit_s: float) -> None:
    """Run one command and say how it went."""
    shown = " ".join(os.path.basename(word) for word in command[1:])
    print(f"\n=== {shown}", flush=True)
    begin = time.monotonic()
    try:
        code: object = subprocess.run(command, cwd=ROOT, timeout=limit_s).returncode
    except subprocess.TimeoutExpired:
        code = f"stopped after {limit_s:.0f} s"
    print(f"--- exit {code}, {time.monotonic() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main()
