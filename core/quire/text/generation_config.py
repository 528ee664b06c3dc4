"""generation_config.json: which tokens end an answer, and a model's own sampling defaults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import Factory, frozen

from quire.errors import ConfigError, RequestError
from quire.request import SamplingParams
from quire.text.json_files import read_optional_json_object, wrong_value

GENERATION_FILE = "generation_config.json"

# Keys that vLLM takes as defaults, and what SamplingParams calls them.
SAMPLING_KEYS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
UNSUPPORTED_NEUTRAL = {"repetition_penalty": 1.0}
MAX_EOS_TOKEN_IDS = 1024


@frozen(kw_only=True)
class GenerationDefaults:
    """What generation_config.json says; empty where there is no such file.

    `sampling` has SamplingParams' names. `warnings` names each key that is not honoured.
    """

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    sampling: Mapping[str, Any] = Factory(dict)
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_folder(cls, folder: Path) -> GenerationDefaults:
        """Read the file. Raises: ConfigError, naming file and key."""
        path = Path(folder) / GENERATION_FILE
        config = read_optional_json_object(path)
        sampling, warnings = _read_sampling(config, path)
        return cls(
            eos_token_ids=read_token_ids(config, "eos_token_id", path),
            bos_token_id=_single(config, "bos_token_id", path),
            pad_token_id=_single(config, "pad_token_id", path),
            sampling=sampling,
            warnings=warnings,
        )

    def all_eos_token_ids(
        self, *, config_eos: Iterable[int] = (), tokenizer_eos: int | None = None
    ) -> frozenset[int]:
        """Return every token that ends an answer: this file's, config.json's, the tokenizer's."""
        own = () if tokenizer_eos is None else (tokenizer_eos,)
        return frozenset((*self.eos_token_ids, *config_eos, *own))

    def sampling_defaults(self) -> dict[str, Any]:
        """Return SamplingParams values for fields that a request leaves out."""
        return dict(self.sampling)


def read_token_ids(config: Mapping[str, Any], key: str, path: Path) -> tuple[int, ...]:
    """Return a key that holds a token id, a list of them, or null.

    Raises: ConfigError, naming file and key. Also for config.json's eos_token_id.
    """
    value = config.get(key)
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if len(ids) > MAX_EOS_TOKEN_IDS or not all(_is_token_id(i) for i in ids):
        raise wrong_value(path, key, value, "a token id, or a list of them")
    return tuple(ids)


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _single(config: Mapping[str, Any], key: str, path: Path) -> int | None:
    ids = read_token_ids(config, key, path)
    return ids[0] if ids else None


def _read_sampling(config: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    sampling: dict[str, Any] = {}
    warnings: list[str] = []
    for key, name in SAMPLING_KEYS.items():
        value = config.get(key)
        if value is None:
            continue
        if key in UNSUPPORTED_NEUTRAL:
            warnings += _check_unsupported(key, value, path)
            continue
        try:
            SamplingParams(**{name: value})
        except RequestError as error:
            raise ConfigError(f"{path}: {key}: {error}") from error
        sampling[name] = value
    return sampling, tuple(warnings)


def _check_unsupported(key: str, value: Any, path: Path) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong_value(path, key, value, "a number")
    if value == UNSUPPORTED_NEUTRAL[key]:
        return []
    return [f"{path}: {key} is {value}, which this version of Quire does not apply; ignored."]
