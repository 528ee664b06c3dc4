"""What the attention layers of a class ask, seen by running it once on shapes alone.

Masks are what counts in Transformers' own forms `eager` and `sdpa`: windows are read from them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor, nn

from quire.interfaces.model import AttentionOptions
from quire_models.transformers.config import Refusal

ATTENTION = "quire"
SEEN = "quire_seen"
# Of attention layers: what they call with queries, keys and values.
CALLED = "_quire_attention"
NUM_TOKENS = 4
ALL_TOKENS = slice(None).indices(NUM_TOKENS)
# Beyond any context: a window of so many tokens is none.
FAR = 1 << 30
# Tokens from which masks are looked at, and how far back.
QUERIES = (0, 1, 2, 5, 16, 4096, 9999, 1 << 20)
NEAR = 9999
OWN_MASK = "computes with its mask by itself, as for ALiBi or another bias of scores."
NO_WINDOW = (
    "has a mask other than of all earlier tokens or of the latest ones: chunks, blocks, or tokens "
    "that see later ones."
)
# What changes no score, or is asked of in another way.
HARMLESS = {
    *("cache_position", "position_ids", "position_embeddings", "layer_idx", "use_cache"),
    *("scaling", "sliding_window", "softcap", "s_aux", "is_causal", "target_dtype"),
    *("dropout", "training", "deterministic", "num_items_in_batch", "logits_to_keep"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
}


@frozen
class Mask:
    """What a class is given instead of a mask, to be handed to its attention function as it is.

    `window`: latest tokens that are seen; None: all of them. `is_served`: it is such a mask.
    """

    window: int | None
    is_served: bool = True

    def _refuse(self, *_given: Any, **_more: Any) -> Any:
        raise Refusal(OWN_MASK)

    __add__ = __radd__ = __mul__ = __rmul__ = __getattr__ = _refuse

    def __getitem__(self, index: Any) -> Mask:
        """Return the mask where all of it is taken."""
        parts = index if isinstance(index, tuple) else (index,)
        if all(isinstance(p, slice) and p.indices(NUM_TOKENS) == ALL_TOKENS for p in parts):
            return self
        raise Refusal(OWN_MASK)

    @classmethod
    def __torch_function__(cls, *_given: Any, **_more: Any) -> Any:
        raise Refusal(OWN_MASK)


@frozen(kw_only=True)
class Seen:
    """What one layer asks; its values have `value_dim` of the `options.head_dim` numbers."""

    options: AttentionOptions
    value_dim: int


@define
class Look:
    """What is seen of a class.

    `layers`: what each module asks of attention, once for each time it is called; `top_k`: how many
    experts of a module serve a token; `called`: its linear layers that are called. `takes_ids`: it
    is given tokens, not their embeddings; `hidden_size`: what its decoder gives its head.
    """

    layers: dict[str, list[Seen]] = field(factory=dict)
    top_k: dict[str, int] = field(factory=dict)
    called: set[str] = field(factory=set)
    takes_ids: bool = False
    hidden_size: int = 0

    @property
    def num_calls(self) -> int:
        """How often attention is called, which is how many layers keep keys and values."""
        return sum(map(len, self.layers.values()))


def bind(module: nn.Module, called: Any) -> None:
    """Let a module's attention function call this; it is no child of the module."""
    object.__setattr__(module, CALLED, called)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Serve as an attention function of Transformers."""
    return getattr(module, CALLED)((query, key, value), attention_mask, options), None


def described_mask(mask_function: Callable[..., Tensor], **_given: Any) -> Mask:
    """Serve as a mask function of Transformers; a class may make masks that nobody takes."""
    with torch.device("cpu"):  # the class itself runs on `meta`
        try:
            return Mask(_window_of(mask_function))
        except Refusal:
            return Mask(None, is_served=False)


def _window_of(mask_function: Callable[..., Tensor]) -> int | None:
    """Return how many of the latest tokens a mask shows, None: all that came before."""
    first, last = 1, FAR
    while first < last:  # the least distance that is out of sight
        middle = (first + last) // 2
        if bool(_sees(mask_function, FAR, torch.tensor([FAR - middle]))[0]):
            first = middle + 1
        else:
            last = middle
    for query in (*QUERIES, *range(max(first - 2, 0), first + 3)):
        if query >= FAR:
            continue
        keys = torch.cat((torch.zeros(1, dtype=torch.int64), torch.arange(query, query + 5)))
        keys = torch.cat((keys, torch.arange(max(query - NEAR, 0), query)))
        distance = query - keys
        wanted = (distance >= 0) & (distance < first)
        if not torch.equal(_sees(mask_function, query, keys), wanted):
            raise Refusal(NO_WINDOW)
    return None if first == FAR else first


def _sees(mask_function: Callable[..., Tensor], query: int, keys: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.int64)
    try:
        found = mask_function(zero, zero, torch.tensor(query), keys)
        return torch.as_tensor(found).bool().expand(keys.shape)
    except Exception as error:
        raise Refusal(NO_WINDOW) from error


@contextlib.contextmanager
def without_packing() -> Iterator[None]:
    """Let no mask be made for sequences that lie in one row: that reads positions."""
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    found = getattr(masking_utils, name, None)
    if found is not None:
        setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        if found is not None:
            setattr(masking_utils, name, found)


def register() -> None:
    """Let Transformers know Quire's attention, and the one that looks."""
    import transformers

    transformers.AttentionInterface.register(ATTENTION, attend)
    transformers.AttentionInterface.register(SEEN, attend)
    transformers.AttentionMaskInterface.register(SEEN, described_mask)


def look_at(net: Any, decoder: Any, look: Look) -> None:
    """Run a class on `meta`, and write down what its layers ask. Raises: Refusal."""
    hooks = []
    for name, module in net.named_modules():
        bind(module, partial(_look, look, name, module))
        if isinstance(module, nn.Linear):
            note = partial(_note, look, name)
            hooks.append(module.register_forward_pre_hook(note))
    tokens = torch.zeros(1, NUM_TOKENS, dtype=torch.int64, device="meta")
    with without_packing():
        given = {"inputs_embeds": net.get_input_embeddings()(tokens)}
        if look.takes_ids:
            given = {"input_ids": tokens}
        found = decoder(**given, position_ids=torch.zeros_like(tokens), use_cache=False)
        look.hidden_size = found.last_hidden_state.shape[-1]
    for hook in hooks:
        hook.remove()


def check_cache(net: Any, look: Look, max_len: int) -> None:
    """Compare windows with those of Transformers' own cache, which forgets what leaves them.

    Raises: Refusal where it forgets what a mask still shows, and sequences get that long.
    """
    from transformers import DynamicCache

    kept = getattr(DynamicCache(config=net.config.get_text_config()), "layers", [])
    for number, name in enumerate(look.layers):
        index = getattr(net.get_submodule(name), "layer_idx", number)
        if not isinstance(index, int) or index >= len(kept):
            continue
        forgets = getattr(kept[index], "sliding_window", None)
        window = look.layers[name][0].options.sliding_window or FAR
        if isinstance(forgets, int) and forgets < min(window, max_len):
            raise Refusal(
                f"has a sliding_window of {forgets} that only the cache of Transformers keeps to, "
                f"not its mask; --max-model-len {forgets} does without it"
            )


def _note(look: Look, name: str, _module: nn.Module, _given: Any) -> None:
    look.called.add(name)


def _look(
    look: Look,
    name: str,
    module: nn.Module,
    heads: tuple[Tensor, Tensor, Tensor],
    mask: Any,
    options: dict[str, Any],
) -> Tensor:
    """Write down what a layer asks."""
    query, key, value = heads
    num_heads, query_dim, value_dim = query.shape[1], query.shape[-1], value.shape[-1]
    _check_shapes(name, query, key, value)
    window = options.get("sliding_window")
    if isinstance(mask, Mask):
        if not mask.is_served:
            raise Refusal(NO_WINDOW)
        window = mask.window
    elif mask is not None:
        raise Refusal(f"has {type(module).__name__}, which adds a bias to scores.")
    else:
        is_causal = options.get("is_causal")
        if (getattr(module, "is_causal", True) if is_causal is None else is_causal) is False:
            raise Refusal(f"has {name}, which sees what comes after a token.")
        if window is not None:
            raise Refusal(f"has {name} with a sliding_window that its mask does not show.")
    for unknown, given in options.items():
        if given is not None and given is not False and unknown not in HARMLESS:
            raise Refusal(f"has {name} with {unknown!r}, which is not passed on.")
    scale, sinks = options.get("scaling"), options.get("s_aux")
    if sinks is not None and sinks.numel() != num_heads:
        raise Refusal(f"has {name} with {sinks.numel()} sinks for {num_heads} heads.")
    asked = AttentionOptions(
        layer_index=look.num_calls,
        num_heads=num_heads,
        num_kv_heads=key.shape[1],
        head_dim=max(query_dim, value_dim),
        scale=query_dim**-0.5 if scale is None else float(scale),
        sliding_window=window,
        logit_softcap=options.get("softcap"),
        sinks=sinks is not None,
    )
    look.layers.setdefault(name, []).append(Seen(options=asked, value_dim=value_dim))
    return query.new_empty(1, NUM_TOKENS, num_heads, value_dim)


def _check_shapes(name: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = [tuple(x.shape) for x in (query, key, value)]
    of_tokens = all(len(s) == 4 and (s[0], s[2]) == (1, NUM_TOKENS) for s in shapes)
    if not of_tokens or key.shape[:3] != value.shape[:3] or key.shape[3] != query.shape[3]:
        found = ", ".join(str(list(shape)) for shape in shapes)
        raise Refusal(
            f"has {name}, which attends with other than one query, key and value a token and head: "
            f"{found} for {NUM_TOKENS} tokens."
        )
    if query.shape[1] % key.shape[1]:
        raise Refusal(f"has {name} with {query.shape[1]} heads for {key.shape[1]} of keys.")
