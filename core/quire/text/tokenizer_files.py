"""What tokenizer_config.json and special_tokens_map.json add to tokenizer.json.

Source: PreTrainedTokenizerBase._from_pretrained and TokenizersBackend.__init__ of Transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from quire.text.json_files import read_optional_json_object, wrong_value

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_MAP_FILE = "special_tokens_map.json"

NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

# Tokens that a tokenizer class of Transformers has where tokenizer_config.json names none.
CLASS_DEFAULTS: dict[str | None, dict[str, str]] = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
    None: {},
}
MISTRAL_MODEL_TYPES = ("mistral", "mistral3", "ministral", "ministral3")


@frozen(kw_only=True)
class DeclaredToken:
    """One added token as a configuration file declares it; `flags` has only what is given."""

    content: str
    flags: Mapping[str, bool]

    def build(self) -> tokenizers.AddedToken:
        """Return it as the `tokenizers` library takes it."""
        from tokenizers import AddedToken

        return AddedToken(self.content, **self.flags)


@frozen(kw_only=True)
class TokenizerConfig:
    """The settings around tokenizer.json.

    `named` maps bos_token and the like to tokens, a model's own names (image_token) included;
    `extra` lists further special tokens; `added` lists added tokens in the order of their ids.
    """

    class_name: str | None
    named: Mapping[str, DeclaredToken]
    extra: tuple[DeclaredToken, ...]
    added: tuple[DeclaredToken, ...]
    clean_up_spaces: bool
    clean_up_bpe_spaces: bool
    split_special_tokens: bool
    add_prefix_space: bool | None
    legacy: bool


def read_tokenizer_config(folder: Path, *, is_byte_level: bool) -> TokenizerConfig:
    """Read both files; a folder with neither has an empty configuration.

    add_bos_token and add_eos_token are not read: beside a tokenizer.json Transformers 5 takes
    the post-processor of that file, whatever they say.
    Raises: ConfigError, naming file and key.
    """
    path = folder / CONFIG_FILE
    config = read_optional_json_object(path)
    class_name = _tokenizer_class(folder, config, is_byte_level=is_byte_level)
    if "added_tokens_decoder" not in config:
        config = {**config, **read_optional_json_object(folder / SPECIAL_MAP_FILE)}
    added = _added_tokens(config.get("added_tokens_decoder"), path)
    by_content = {token.content: token for token in added}
    # A null in the file takes a class's default away.
    named = _named_tokens({**CLASS_DEFAULTS[class_name], **config}, path)
    return TokenizerConfig(
        class_name=class_name,
        named={key: by_content.get(token.content, token) for key, token in named.items()},
        extra=_extra_tokens(config, path),
        added=added,
        clean_up_spaces=_flag(config, "clean_up_tokenization_spaces", path),
        clean_up_bpe_spaces=_flag(
            config, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", path
        ),
        split_special_tokens=_flag(config, "split_special_tokens", path),
        add_prefix_space=_optional_flag(config, "add_prefix_space", path),
        legacy=_flag(config, "legacy", path),
    )


def _optional_flag(config: Mapping[str, Any], key: str, path: Path) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise wrong_value(path, key, value, "true, false or null")
    return value


def _flag(config: Mapping[str, Any], key: str, path: Path) -> bool:
    return bool(_optional_flag(config, key, path))


def _declared(value: Any, path: Path, key: str) -> DeclaredToken:
    """Return a token given as a string or as an AddedToken's fields."""
    allowed = "a string, or an object with a string `content` and true-or-false flags"
    if isinstance(value, str):
        return DeclaredToken(content=value, flags={"special": True})
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise wrong_value(path, key, value, allowed)
    flags = {name: value[name] for name in TOKEN_FLAGS if name in value}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise wrong_value(path, key, value, allowed)
    return DeclaredToken(content=value["content"], flags=flags)


def _named_tokens(config: Mapping[str, Any], path: Path) -> dict[str, DeclaredToken]:
    named = {}
    for key, value in config.items():
        if value is None or not key.endswith("_token"):
            continue
        if key in NAMED_TOKENS:
            token = _declared(value, path, key)
            named[key] = DeclaredToken(
                content=token.content, flags={**token.flags, "special": True}
            )
        elif isinstance(value, str):
            named[key] = _declared(value, path, key)
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        named.update({k: _declared(v, path, f"extra_special_tokens.{k}") for k, v in extra.items()})
    return named


def _extra_tokens(config: Mapping[str, Any], path: Path) -> tuple[DeclaredToken, ...]:
    key = "extra_special_tokens"
    if not config.get(key):
        key = "additional_special_tokens"
    value = config.get(key)
    if value is None or isinstance(value, dict):
        return ()
    if not isinstance(value, list):
        raise wrong_value(path, key, value, "a list of tokens")
    return tuple(_declared(token, path, key) for token in value)


def _added_tokens(value: Any, path: Path) -> tuple[DeclaredToken, ...]:
    key = "added_tokens_decoder"
    if value is None:
        return ()
    if not isinstance(value, dict) or not all(str(k).isdecimal() for k in value):
        raise wrong_value(path, key, value, "an object from token ids to tokens")
    in_order = sorted(value.items(), key=lambda item: int(item[0]))
    return tuple(_declared(token, path, f"{key}.{index}") for index, token in in_order)


def _tokenizer_class(folder: Path, config: Mapping[str, Any], *, is_byte_level: bool) -> str | None:
    """Return which class AutoTokenizer would take, if it rebuilds parts of tokenizer.json.

    LlamaTokenizer and Qwen2Tokenizer set their own normalizer, pre-tokenizer and decoder; every
    other choice for the model families served here takes tokenizer.json as it is: None.
    """
    model = read_optional_json_object(folder / "config.json")
    model_type = model.get("model_type")
    declared = config.get("tokenizer_class") or model.get("tokenizer_class")
    name = declared.removesuffix("Fast") if isinstance(declared, str) else None
    if model_type == "qwen2" or (model_type == "qwen3" and name is None):
        return "Qwen2Tokenizer"
    if model_type in MISTRAL_MODEL_TYPES or name not in CLASS_DEFAULTS:
        return None
    return None if name == "LlamaTokenizer" and is_byte_level else name
