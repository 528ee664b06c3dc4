"""Train the byte-level BPE tokenizer and write its files in Hugging Face form."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from quire_models.demo.chat import TEMPLATE

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
# Kept in decoded text, where a tool-call parser looks for them.
TOOL_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# A name or word with the space before it; a run of signs, as JSON has between two names, with the
# line end after it; or white space. `{"name": "get_menu_items"` is then four tokens: `{"`, `name`,
# `": "` and `get_menu_items`.
WORDS = (
    r"'(?:[sdmt]|ll|ve|re)(?!\p{L})| ?[\p{L}_]+|\p{N}"
    r"| ?[^\s\p{L}\p{N}_]+(?: [^\s\p{L}\p{N}_]+)*[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], *, vocabulary_size: int) -> Tokenizer:
    """Train on `texts`; each digit is a token of its own, so that ids are copied digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[
            AddedToken(token, special=True, normalized=False)
            for token in (*CONTROL_TOKENS, *TOOL_TOKENS)
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_visible_tool_tokens(tokenizer)


def _with_visible_tool_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Make the tool tokens ordinary ones, which decoding keeps; the trainer made them special."""
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["content"] not in TOOL_TOKENS
    return Tokenizer.from_str(json.dumps(state))


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, context_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": END_OF_TEXT, "eos_token": TURN_END, "pad_token": END_OF_TEXT}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "unk_token": None,
        **roles,
        "additional_special_tokens": [TURN_START, TURN_END],
        "chat_template": TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(
        folder / "special_tokens_map.json",
        roles | {"additional_special_tokens": [TURN_START, TURN_END]},
    )


def write_json(path: Path, value: object) -> None:
    """Write indented JSON with a final line end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
