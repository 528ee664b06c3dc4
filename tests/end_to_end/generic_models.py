"""Every causal class of Transformers through the plugin `transformers`: served, or refused and why.

    python tests/end_to_end/generic_models.py [ARCHITECTURE ...]

prints a line for each: the class, then `equal` (greedy tokens in float32 as `generate` gives them),
`refused` with the reason, or `wrong`, of which there must be none. With QUIRE_TEST_DEVICE=cuda
before it they run on a GPU.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import ARCHITECTURES, VOCAB, make_model

from quire import LLM, SamplingParams
from quire.errors import QuireError

DEVICE = os.environ.get("QUIRE_TEST_DEVICE", "cpu")
# Longer than any window or chunk of the tiny models, and than a step; two begin alike.
PROMPT_LENS = (1, 9, 33, 40)
NUM_NEW = 12


def make_prompts(vocab: int) -> list[list[int]]:
    """Return ragged prompts; the last two have their first 24 tokens in common."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, vocab, (len(PROMPT_LENS), max(PROMPT_LENS)), generator=generator)
    ids[-1, :24] = ids[-2, :24]
    return [row[:length].tolist() for row, length in zip(ids, PROMPT_LENS, strict=True)]


@torch.inference_mode()
def generated(oracle: Any, prompt: list[int]) -> list[int]:
    """Return the greedy tokens of Transformers' own loop."""
    given = torch.tensor([prompt])
    found = oracle.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=NUM_NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = found[0, len(prompt) :].tolist()
    return tokens


def start(folder: Path, **options: Any) -> LLM:
    """Start the plugin on a folder, with steps that cut prompts and blocks that are small."""
    return LLM(
        str(folder),
        dtype="float32",
        device=DEVICE,
        num_threads=1,
        model_implementation="transformers",
        attention_backend="reference" if DEVICE == "cpu" else "auto",
        max_model_len=max(PROMPT_LENS) + NUM_NEW,
        block_size=4 if DEVICE == "cpu" else 16,
        max_num_batched_tokens=14,
        max_num_seqs=3,
        kv_cache_memory_bytes=1 << 22,
        skip_tokenizer_init=True,
        **options,
    )


def complete(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    """Return the greedy tokens of the engine."""
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True, detokenize=False)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [list(o.outputs[0].token_ids) for o in llm.generate(given, params, use_tqdm=False)]


@torch.inference_mode()
def is_tie(oracle: Any, tokens: list[int], ours: int, theirs: int) -> bool:
    """Answer whether two candidates are too close for float32 to tell them apart."""
    plain = oracle(torch.tensor([tokens])).logits[0, -1].double()
    exact = oracle.double()(torch.tensor([tokens])).logits[0, -1].double()
    oracle.float()
    bound = 4 * float((plain - exact).abs().max()) + 2e-7 * float(exact.abs().max())
    return abs(float(exact[ours] - exact[theirs])) <= bound


def first_difference(oracle: Any, prompt: list[int], found: list[int], wanted: list[int]) -> str:
    """Return what is wrong with the tokens found for a prompt, or nothing."""
    for i, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        if ours != theirs:
            if is_tie(oracle, prompt + wanted[:i], ours, theirs):
                return ""
            return f"token {i} after {len(prompt)}: {ours} instead of {theirs}"
    return ""


def outcome(architecture: str, folder: Path) -> str:
    """Return `equal`, `refused: WHY` or `wrong: WHAT` for the class, tiny and random."""
    oracle = make_model(architecture)
    oracle.save_pretrained(folder)
    try:
        llm = start(folder)
    except QuireError as error:
        return f"refused: {reason(str(error))}"
    prompts = make_prompts(min(VOCAB, oracle.config.get_text_config().vocab_size))
    wanted = [generated(oracle, prompt) for prompt in prompts]
    # Once more, from the prefix cache.
    for found in (complete(llm, prompts), complete(llm, prompts)):
        for prompt, ours, theirs in zip(prompts, found, wanted, strict=True):
            if wrong := first_difference(oracle, prompt, ours, theirs):
                return f"wrong: {wrong}"
    return "equal"


def reason(message: str) -> str:
    """Return what a refusal says of the class, without the folder and the remedy."""
    found = re.search(r"cannot build \w+: it (.*)\. A plugin that claims", message)
    return found[1] if found else re.sub(r"\S*/", "", message)


def main(names: list[str]) -> None:
    """Print the outcome of each class."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name in names or ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = outcome(name, Path(folder))
            except Exception as error:  # noqa: BLE001 - the classes are Transformers' and many
                found = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(f"{name}\t{found}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
