"""Text to token ids and back, from a checkpoint's tokenizer.json, with Transformers' results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.errors import ConfigError, RequestError
from quire.text.json_files import read_text, shorten
from quire.text.pieces import PieceTable
from quire.text.tokenizer_files import (
    TOKENIZER_FILE,
    TokenizerConfig,
    read_tokenizer_config,
)

if TYPE_CHECKING:
    import tokenizers

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PANIC = "PanicException"

# In this order: Transformers' clean_up_tokenization.
CLEAN_UPS = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def clean_up_spaces(text: str) -> str:
    """Remove the spaces that word tokenizers leave before punctuation."""
    for spaced in CLEAN_UPS:
        text = text.replace(spaced, spaced.strip(" "))
    return text


class Tokenizer:
    """A checkpoint's tokenizer. Ids and texts equal Transformers' AutoTokenizer's.

    Safe to share between threads: nothing changes after construction.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.added_token_ids = frozenset(added)
        special = {i: t.content for i, t in added.items() if t.special}
        self.special_token_ids = frozenset(special)
        # The library compares spellings after the normalizer, which may change a token's own.
        spellings = frozenset(special.values())
        self.skipped_token_ids = frozenset(i for i in special if self.id_to_token(i) in spellings)
        self.special_tokens = {name: token.content for name, token in config.named.items()}
        self.cleans_up_spaces = config.clean_up_spaces and (
            type(backend.model).__name__ != "BPE" or config.clean_up_bpe_spaces
        )
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.longest_token_chars = max(map(len, vocab), default=1)
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        self.pad_token_id = self._named_id("pad_token")
        self.unk_token_id = self._named_id("unk_token")
        self.pieces = PieceTable(self._decoder_state(), self.id_to_token, self._decode_ids)
        start = self.encode("")[:1]
        self.adds_bos = self.bos_token_id is not None and start == [self.bos_token_id]

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json and the settings beside it.

        Raises: ConfigError, naming file and key.
        """
        path = Path(folder) / TOKENIZER_FILE
        if not path.is_file():
            raise ConfigError(
                f"{path}: not found; a model folder needs a {TOKENIZER_FILE}. Make one with "
                "transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
            )
        source = read_text(path)
        config = read_tokenizer_config(Path(folder), is_byte_level='"ByteLevel"' in source)
        backend = _parse(source, path)
        _apply_class(backend, config)
        _add_declared_tokens(backend, config)
        try:
            return cls(backend, config)
        except RequestError as error:
            raise ConfigError(f"{path}: damaged: {error}") from error

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text.

        Raises: RequestError for a text with half a surrogate pair.
        """
        with _panics_as_errors("prompt"):
            try:
                return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
            except (TypeError, UnicodeEncodeError) as error:
                raise _not_text(text) from error

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Return the token ids of each text; the texts are shared among threads."""
        broken = [text for text in texts if not isinstance(text, str) or not is_encodable(text)]
        if broken:
            raise _not_text(broken[0])
        with _panics_as_errors("prompt"):
            found = self._backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [list(encoding.ids) for encoding in found]

    def encode_texts(
        self, text: str, second: str | None = None, longest: int | None = None
    ) -> tuple[list[int], int | None]:
        """Return the ids of a text or a pair, and where the second text's tokens begin.

        Special tokens are put in and around. Of more than `longest` tokens the first ones of a
        text are kept, and of a pair as many as possible of the shorter text.
        Raises: RequestError for a text with half a surrogate pair, or too small a `longest`.
        """
        for one in (text, second):
            if one is not None and not is_encodable(one):
                raise _not_text(one)
        with _panics_as_errors("input"):
            if longest is None:
                found = self._backend.encode(text, second)
            else:
                found = self._encode_cut(text, second, longest)
        types = found.type_ids
        return list(found.ids), types.index(1) if second is not None and 1 in types else None

    def _encode_cut(self, text: str, second: str | None, longest: int) -> Any:
        num_special = self._backend.num_special_tokens_to_add(second is not None)
        room = longest - num_special
        if room < 1:
            raise RequestError(
                f"truncate_prompt_tokens is {longest}, and {num_special} tokens are special; "
                f"allowed: from {num_special + 1}.",
                parameter="truncate_prompt_tokens",
            )
        first = self._backend.encode(text, add_special_tokens=False)
        if second is None:
            first.truncate(room)
            return self._backend.post_process(first, None, True)
        other = self._backend.encode(second, add_special_tokens=False)
        first_len, other_len = _shared(len(first.ids), len(other.ids), room)
        first.truncate(first_len)
        other.truncate(other_len)
        return self._backend.post_process(first, other, True)

    def encode_chat(self, text: str) -> list[int]:
        """Return the ids of a rendered chat template, with the begin token exactly once.

        The template writes its own special tokens, so none are added; but where the tokenizer
        begins every text with the begin token and the template did not write it, it is put first.
        """
        ids = self.encode(text, add_special_tokens=False)
        if self.adds_bos and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            return [self.bos_token_id, *ids]
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids. Ids that no token has are left out.

        Raises: RequestError for what cannot be an id.
        """
        text = self._decode_ids(list(token_ids), skip_special_tokens)
        return clean_up_spaces(text) if self.cleans_up_spaces else text

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token by its exact spelling in the vocabulary."""
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """Return a token as the vocabulary spells it, None for an id without a token."""
        return self._backend.id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for inside a text, b"" for an id without a token.

        Special tokens give their spelling. A token that begins a word has its space, which
        `decode` drops where the text begins.
        """
        piece, plan = self.pieces[token_id], self.pieces.plan
        if piece is None:
            return b""
        if isinstance(piece, bytes):
            return piece
        if plan is None:  # a decoder that works on whole lists only
            return self._decode_ids([token_id], False).encode()
        if isinstance(piece, int):
            return bytes([piece])
        if plan.metaspace:
            piece = piece.replace(plan.metaspace, " ")
        return (plan.separator + piece).encode()

    def to_json(self) -> str:
        """Return it as a `tokenizer.json`, with what its class and its settings change."""
        return str(self._backend.to_str())

    def check_fits(self, model_vocab_size: int) -> None:
        """Refuse a tokenizer with ids that the model cannot embed.

        Raises: ConfigError with both sizes.
        """
        if self.vocab_size > model_vocab_size:
            last = shorten(self.id_to_token(self.vocab_size - 1))
            raise ConfigError(
                f"{TOKENIZER_FILE}: token {last} has id {self.vocab_size - 1}, but vocab_size in "
                f"config.json is {model_vocab_size}; use the tokenizer that belongs to the model."
            )

    def _decode_ids(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        with _panics_as_errors("token_ids"):
            try:
                return str(self._backend.decode(list(token_ids), skip_special_tokens))
            except (TypeError, OverflowError) as error:
                raise RequestError(
                    "token ids are not all whole numbers from 0 below 2**32.",
                    parameter="token_ids",
                ) from error

    def _decoder_state(self) -> bytes | None:
        """Return the decoder's description as JSON, None where tokens are joined by spaces."""
        decoder: Any = self._backend.decoder
        return None if decoder is None else bytes(decoder.__getstate__())

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_to_id(token)


def _shared(first: int, second: int, room: int) -> tuple[int, int]:
    """Return how many tokens two texts keep of `room`, taken from the longer one first.

    Source: "longest_first" of the tokenizers library.
    """
    if first + second <= room:
        return first, second
    short = min(first, second, room // 2)
    kept = short, room - short
    return kept if first <= second else (kept[1], kept[0])


@contextmanager
def _panics_as_errors(parameter: str) -> Iterator[None]:
    """Turn a panic of the library, which is no Exception, into one request's error."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != PANIC:
            raise
        raise RequestError(
            f"the tokenizer fails on this input: {shorten(str(error))}.", parameter=parameter
        ) from error


def is_encodable(text: str) -> bool:
    """Whether a text has a UTF-8 form: no half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _not_text(text: object) -> RequestError:
    if not isinstance(text, str):
        kind = type(text).__name__
        return RequestError(f"prompt is a {kind}; allowed: a string.", parameter="prompt")
    return RequestError(
        "prompt has half a surrogate pair, which is not a character; send valid Unicode.",
        parameter="prompt",
    )


def _parse(source: str, path: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_str(source)
    # The library raises bare Exception for what it cannot parse, and panics on some damaged files.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        reason = shorten(str(error), 160)
        raise ConfigError(f"{path}: damaged or not a tokenizer: {reason}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _apply_class(backend: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
    """Replace what the tokenizer's class in Transformers replaces."""
    if config.class_name == "LlamaTokenizer":
        _make_llama(backend, config)
    elif config.class_name == "Qwen2Tokenizer":
        _make_qwen2(backend, config)
    backend.encode_special_tokens = config.split_special_tokens


def _make_llama(backend: Any, config: TokenizerConfig) -> None:
    from tokenizers import decoders, pre_tokenizers

    prefix = config.add_prefix_space is not False
    scheme = ("always" if config.legacy else "first") if prefix else "never"
    backend.model.fuse_unk = True
    backend.model.byte_fallback = True
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme=scheme, split=False
    )
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )


def _make_qwen2(backend: Any, config: TokenizerConfig) -> None:
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(
                add_prefix_space=config.add_prefix_space is True, use_regex=False
            ),
        ]
    )
    backend.decoder = decoders.ByteLevel()


def _add_declared_tokens(backend: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
    """Add what the settings declare and tokenizer.json lacks, in Transformers' order."""
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    contents = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = [token.build() for token in config.added]
    missing = [token for token in missing if repr(token) not in known]
    contents.update(token.content for token in missing)
    special: Mapping[str, Any] = {t.content: t for t in (*config.named.values(), *config.extra)}
    for content, token in special.items():
        if content not in contents:
            missing.append(token.build())
    names = {token.content for token in config.named.values()}
    for built in missing:
        built.special = built.special or built.content in names
    if missing:
        backend.add_tokens(missing)
