"""The real class of Transformers on the same tiny config, right or with one known mistake.

Transformers is imported when a model is checked, and never where none is.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.testing.model_cases import WEIGHT, ModelSubject, config_json, given_by
from quire.testing.model_mistakes import MISTAKES


def why_missing(subject: ModelSubject) -> str | None:
    """Return why there is no real class to compare with; None: there is one."""
    if "why_missing" not in subject.made:
        subject.made["why_missing"] = _why_missing(subject)
    found: str | None = subject.made["why_missing"]
    return found


def _why_missing(subject: ModelSubject) -> str | None:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        return "transformers is not installed; pip install 'transformers>=5' brings the real class"
    if getattr(transformers, _name(subject), None) is None:
        return f"transformers has no class {_name(subject)}"
    if getattr(_class(subject).config_class, "sub_configs", None):
        return f"{_name(subject)} has parts whose configs are their own; the kit makes plain ones"
    return None


def _name(subject: ModelSubject) -> str:
    return subject.oracle or subject.architecture


def _class(subject: ModelSubject) -> Any:
    return getattr(importlib.import_module("transformers"), _name(subject))


def oracle_of(subject: ModelSubject, variation: str, seed: int) -> Any:
    """Return the real class with random weights, in float32; None: it refuses the config."""
    key = ("oracle", variation, seed)
    if key not in subject.made:
        subject.made[key] = _make(subject, config_json(subject, variation), seed)
        model = subject.made[key]
        saved = None if model is None else json.loads(model.config.to_json_string(use_diff=False))
        subject.made["saved", variation] = saved
    return subject.made[key]


def _make(subject: ModelSubject, given: dict[str, Any], seed: int) -> Any:
    real = _class(subject)
    try:
        config = real.config_class(**copy.deepcopy(given))
        # Falcon's plain form adds ALiBi to the scores and, again, to the mask.
        is_twice = bool(getattr(config, "alibi", False))
        config._attn_implementation = "sdpa" if is_twice else "eager"
        config._experts_implementation = "eager"
        if (getattr(config, "pad_token_id", None) or 0) >= config.vocab_size:
            config.pad_token_id = None  # the class's own, for a larger vocabulary
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = real(config).eval()
            model.gives_vectors = given_by(subject) == "vectors"
            _draw(model)
    except (TypeError, ValueError, KeyError, AttributeError):
        return None
    return model


def _draw(model: Any) -> None:
    """Fill a model with random weights, and what of its buffers lies in files."""
    own = dict(model.named_parameters())
    for name, parameter in own.items():
        is_norm = parameter.dim() == 1 and name.endswith("weight")
        parameter.data.normal_(0.0, WEIGHT).add_(1.0 if is_norm else 0.0)
        parameter.requires_grad_(False)
    for name, buffer in model.state_dict().items():
        if buffer.is_floating_point() and name not in own:
            # Biases of a choice: larger ones would leave experts that no token has.
            buffer.normal_(0.0, WEIGHT / 4)


def tensors_of(subject: ModelSubject, variation: str, seed: int) -> dict[str, Tensor] | None:
    """Return what the real class writes into a checkpoint; None: it refuses the config.

    In the files' names and shapes: the class in memory may have others, as for experts.
    """
    key = ("tensors", variation, seed)
    if key not in subject.made:
        model = oracle_of(subject, variation, seed)
        subject.made[key] = None if model is None else _written(model)
    found: dict[str, Tensor] | None = subject.made[key]
    return found


def _written(model: Any) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    # It draws a bar of its progress there.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
        for file in sorted(Path(folder).glob("*.safetensors")):
            found.update(load_file(file))
    return found


@torch.inference_mode()
def logits_of(model: Any, sequences: list[list[int]], chunk: int | None = None) -> Tensor:
    """Return the logits [tokens, vocab_size] of all tokens, each sequence by itself.

    With `chunk` so many tokens at a time, with the real class's own cache. Of a class without
    logits the last hidden states, of one for sequences their scores.
    """
    found = []
    asked = model.base_model if model.gives_vectors else model
    names = inspect.signature(asked.forward).parameters
    cache_name = "cache" if "cache" in names else "past_key_values"
    for sequence in sequences:
        size = chunk or len(sequence)
        kept: dict[str, Any] = {}
        for first in range(0, len(sequence), size):
            part = torch.tensor([sequence[first : first + size]])
            options = {"use_cache": chunk is not None} if "use_cache" in names else {}
            done = asked(part, **options, **kept)
            kept = {} if chunk is None else {cache_name: done[cache_name]}
            if model.gives_vectors:
                found.append(done.last_hidden_state[0])
            elif done.logits.dim() == 3:
                found.append(done.logits[0])
            elif first + size >= len(sequence):
                found.append(done.logits)
    return torch.cat(found)


def explain(
    subject: ModelSubject, variation: str, seed: int, sequences: list[list[int]], out: Tensor
) -> str | None:
    """Return the words of the first known mistake that gives the logits that came out."""
    right = oracle_of(subject, variation, seed)
    if right is None or not bool(out.isfinite().all()):
        return "some numbers are not finite: a weight may not be loaded"
    if _is_near(copy.deepcopy(right).double(), sequences, out):
        return None
    for words, put in MISTAKES:
        wrong = copy.deepcopy(right).double()
        with contextlib.suppress(AttributeError, RuntimeError, TypeError, ValueError):
            if put(wrong) and _is_near(wrong, sequences, out):
                return words
    return None


def _is_near(model: Any, sequences: list[list[int]], out: Tensor) -> bool:
    """Answer whether a float64 model gives the logits: it is recognised, not judged."""
    expected = logits_of(model, sequences)
    unit = 256 * torch.finfo(torch.float32).eps * expected.abs().max().item()
    return bool(((out.double() - expected).abs() <= unit).all())
