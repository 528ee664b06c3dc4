"""Any causal model of Transformers on the paged KV cache.

    Quire's batch  ->  the class of Transformers, its tokens as one row  ->  Quire's logits
                         its attention function   ->  Quire's attention layers
                         its experts' function    ->  Quire's experts
                         its linear layers        ->  Quire's, of any quantization

What a layer asks of attention is seen by running the class once on `meta`. What does not keep to
keys and values a token - recurrent states, biases of scores - is refused: there, or once the
weights are loaded and `check_tokens_alone` finds it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quire.errors import ConfigError
from quire.interfaces.batch import Batch
from quire.interfaces.model import BuildContext, Model, WeightNames
from quire.layers.attention import Attention
from quire.layers.dense_attention import dense_attention
from quire.layers.embedding import NoHead
from quire_models.transformers import attention, experts
from quire_models.transformers.attention import Look, Seen
from quire_models.transformers.check import (
    check_attention,
    check_cache,
    check_tokens_alone,
    stand_in,
    takes_embeddings,
)
from quire_models.transformers.config import (
    AnyConfig,
    Refusal,
    model_class,
    named_true,
    transformers_config,
    undivided,
)
from quire_models.transformers.decoder import behind_decoder, decoder_of
from quire_models.transformers.layers import exchange_layers, fill_parameters, pin_rotation
from quire_models.transformers.names import IGNORED, aliases

# Queries, keys and values of a step, as Transformers has them: [1, heads, num_tokens, dim] each.
Heads = tuple[Tensor, Tensor, Tensor]


class TransformersModel(Model):
    """A causal model class of Transformers, its layers and its attention exchanged."""

    def __init__(self, config: AnyConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        look = seen_of(config, build.max_model_len)
        with parameters_on_meta():
            self.net = make(config, attention.ATTENTION)
        self._batch: list[Batch] = []
        self._calls: Counter[str] = Counter()
        # Some look more up of a token than its embedding.
        self._takes_ids = look.takes_ids
        self.attention = nn.ModuleList()
        self._layers: dict[str, list[tuple[Attention, Seen]]] = {}
        for name, seen in look.layers.items():
            self._layers[name] = [(_attention_layer(name, one, build), one) for one in seen]
            self.attention.extend(layer for layer, _ in self._layers[name])
        # In a tuple: it is no child of this module, but of the class.
        self._decoder = (decoder_of(self.net),)
        names = aliases(self.net)
        with told(config):
            pin_rotation(self.net, build.max_model_len)
            experts.exchange(self.net, look.top_k, build)
            ignored = exchange_layers(self.net, look.called, config.tie_word_embeddings, build)
            ignored += fill_parameters(self.net, build)
        self._has_head = not any(isinstance(one, NoHead) for one in self.net.modules())
        self.weight_names = WeightNames(  # type: ignore[misc]
            renamed={r"^net\.": ""},
            ignored=(*IGNORED, *ignored),
            aliases=names,
            base=f"{self.net.base_model_prefix}.",
        )
        self._bind_layers()

    def _bind_layers(self) -> None:
        for name in self._layers:
            attention.bind(self.net.get_submodule(name), partial(self._attend, name))

    def _attend(
        self,
        name: str,
        heads: Heads,
        _mask: Any,
        options: dict[str, Any],
    ) -> Tensor:
        """Return [1, num_tokens, heads, value_dim] for [1, heads, num_tokens, dim] of each."""
        layer, seen = self._next_layer(name, options)
        size = seen.options.head_dim
        rows = torch.cat([_wide(x, size) for x in heads], dim=1)[0]
        qkv = rows.transpose(0, 1).reshape(rows.shape[1], -1)
        out: Tensor = layer(qkv, self._batch[0])
        return out.view(1, len(out), heads[0].shape[1], -1)[..., : seen.value_dim].contiguous()

    def finish_loading(self) -> None:
        """Check that the class does with Quire's attention and cache what it does with its own.

        Raises: ConfigError where tokens see each other otherwise.
        """
        assert isinstance(self.config, AnyConfig), type(self.config)
        given = self.config.vocab_size, next(self.net.parameters()).device
        for name in self._layers:
            attention.bind(self.net.get_submodule(name), _alone)
        with told(self.config), torch.inference_mode():
            if not takes_embeddings(self._own_whole, self._ours, *given):
                self._takes_ids = True
            check_tokens_alone(self._own_whole, self._ours, *given)
        for name in self._layers:
            attention.bind(self.net.get_submodule(name), partial(self._attend_densely, name))
        with told(self.config, "cannot go on with a cache of its own: "), torch.inference_mode():
            check_cache(self._in_own_form, self._cached, *given)
            check_attention(self._in_own_form, self._ours, *given)
        self._bind_layers()

    def _attend_densely(
        self,
        name: str,
        heads: Heads,
        _mask: Any,
        options: dict[str, Any],
    ) -> Tensor:
        """Attend as a layer of Quire's is asked to, by the formula."""
        layer, seen = self._next_layer(name, options)
        kind, device = heads[0].dtype, heads[0].device.type
        dtype = str(kind).removeprefix("torch.")
        spec = layer.spec(dtype=dtype, kv_dtype=dtype, block_size=1, device=device)
        rows = [_wide(x, seen.options.head_dim)[0].transpose(0, 1) for x in heads]
        out = dense_attention(spec, *rows, dtype=kind, sinks=layer.sinks)
        return out[None, ..., : seen.value_dim].contiguous()

    def _next_layer(self, name: str, options: dict[str, Any]) -> tuple[Attention, Seen]:
        """Return the layer for the next call of a module, its sinks as the class has them."""
        layer, seen = self._layers[name][self._calls[name]]
        self._calls[name] += 1
        if seen.options.sinks:
            assert isinstance(layer.sinks, Tensor), name
            layer.sinks.copy_(options["s_aux"].reshape(-1))
        return layer, seen

    def _in_own_form(self, token_ids: Tensor) -> Tensor:
        with own_attention(self.net):
            return self._own_whole(token_ids)

    def _own(self, token_ids: Tensor, **options: Any) -> tuple[Any, Tensor]:
        """Return what the class itself makes of tokens: its output, and logits or hidden states."""
        if self._has_head:
            found = self.net(input_ids=token_ids[None], **options)
            return found, found.logits[0]
        found = self._decoder[0](input_ids=token_ids[None], **options)
        return found, found.last_hidden_state[0]

    def _own_whole(self, token_ids: Tensor) -> Tensor:
        return self._own(token_ids, use_cache=False)[1]

    def _cached(self, token_ids: Tensor, num_first: int) -> Tensor:
        called = self.net if self._has_head else self._decoder[0]
        is_new = "cache" in inspect.signature(called.forward).parameters
        name = "cache" if is_new else "past_key_values"
        cache, made = None, []
        with own_attention(self.net):
            for piece in (token_ids[:num_first], *token_ids[num_first:].split(1)):
                found, states = self._own(piece, use_cache=True, **{name: cache})
                cache = getattr(found, name, None) or getattr(found, "past_key_values", None)
                if cache is None:  # a class that computes all again for each token
                    return self._own_whole(token_ids)
                made.append(states)
        return torch.cat(made)

    def _ours(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        hidden = self._hidden(self.embed(token_ids), token_ids, positions)
        return self.logits(hidden) if self._has_head else hidden

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the embeddings of int32 `token_ids` [num_tokens]."""
        hidden: Tensor = self.net.get_input_embeddings()(token_ids)
        return hidden

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return the last hidden states [num_tokens, hidden_size], final norm included."""
        self._batch[:] = [batch]
        return self._hidden(hidden, batch.token_ids, batch.positions)

    def _hidden(self, hidden: Tensor, token_ids: Tensor, positions: Tensor) -> Tensor:
        self._calls.clear()
        given = {"inputs_embeds": hidden[None]}
        if self._takes_ids:
            given = {"input_ids": token_ids[None].long()}
        found = self._decoder[0](**given, position_ids=positions[None].long(), use_cache=False)
        last: Tensor = found.last_hidden_state[0]
        return last

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [num_rows, vocab_size]."""
        return behind_decoder(self.net, hidden)


def _attention_layer(name: str, seen: Seen, build: BuildContext) -> Attention:
    layer = build.attention(name, seen.options)
    assert isinstance(layer, Attention), type(layer)
    if seen.options.sinks:
        # The class has them among its own weights, whatever it calls them.
        del layer.sinks
        size = seen.options.num_heads
        layer.sinks = torch.empty(size, dtype=torch.float32, device=build.device)
    return layer


def _wide(heads: Tensor, size: int) -> Tensor:
    """Return heads with zeros behind, up to `size`: they add nothing to scores and values."""
    missing = size - heads.shape[-1]
    return functional.pad(heads, (0, missing)) if missing else heads


def _alone(heads: Heads, _mask: Any, _options: Any) -> Tensor:
    return stand_in(*heads)


def make(config: AnyConfig, attention_name: str) -> Any:
    """Return the class with its random weights. Raises: ConfigError with its own words."""
    attention.register()
    experts.register()
    read = transformers_config(config.architecture, config.given, config.source)
    read._attn_implementation = attention_name
    read._experts_implementation = experts.EXPERTS
    try:
        net = model_class(config.architecture, config.given, config.source)(read).eval()
    except KeyError as error:
        if attention_name not in error.args:
            raise refused(config, f"cannot be made: {_words(error)}") from error
        why = "has forms of attention of its own instead of Transformers' attention interface"
        raise refused(config, why) from error
    except Exception as error:
        raise refused(config, f"cannot be made: {_words(error)}") from error
    if decoder_of(net) is None:
        raise refused(config, "has no decoder that gives hidden states")
    return net


@contextlib.contextmanager
def own_attention(net: Any) -> Iterator[None]:
    """Let a class attend by itself, in the form of Transformers' that every class has."""
    net.config._attn_implementation = "eager"
    try:
        yield
    finally:
        net.config._attn_implementation = attention.ATTENTION


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Make modules whose parameters take no memory, while their buffers are computed."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        # One that is shared comes twice, and stays the same.
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def seen_of(config: AnyConfig, max_len: int) -> Look:
    """Return what the class asks for. Raises: ConfigError for what Quire's layers do not do."""
    with torch.device("meta"):
        net = make(config, attention.SEEN)
    with told(config, "does not run on shapes alone: "), torch.device("meta"):
        pin_rotation(net, None)
        look = _look_at(net, decoder_of(net))
        behind_decoder(net, torch.empty(2, look.hidden_size))
    if look.num_calls < config.num_hidden_layers:
        raise refused(
            config,
            f"has {config.num_hidden_layers} layers, of which {look.num_calls} call "
            f"Transformers' attention interface; the others keep a state of their own (as Mamba "
            f"and convolutions do), or attend by themselves",
        )
    with told(config):
        attention.check_cache(net, look, max_len)
    return look


def _look_at(net: Any, decoder: Any) -> Look:
    """Look at a class that is given embeddings, or else tokens."""
    for takes_ids in (False, True):
        look = Look(takes_ids=takes_ids)
        for name, module in net.named_modules():
            experts.bind(module, partial(experts.note_top_k, look.top_k, name))
        try:
            attention.look_at(net, decoder, look)
        except Refusal:
            raise
        except Exception:
            if takes_ids:
                raise
        else:
            break
    return look


@contextlib.contextmanager
def told(config: AnyConfig, before: str = "does not run: ") -> Iterator[None]:
    """Say of any error which model cannot be built, and where."""
    try:
        yield
    except Refusal as error:
        raise refused(config, str(error)) from error
    except ConfigError:
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise refused(config, f"{before}{_words(error)}") from error


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _keys_behind(config: AnyConfig, why: str) -> str:
    """Return the keys of config.json that a refusal follows from, where they can be told."""
    read = transformers_config(config.architecture, config.given, config.source)
    if why == attention.OWN_MASK:
        found = [f"{name} is true" for name in named_true(read.to_dict(), "alibi")]
    else:
        kinds = getattr(read.get_text_config(), "layer_types", None) or ()
        found = [f"layer_types: {', '.join(dict.fromkeys(kinds))}"] if "layers, of" in why else []
        found += undivided(read.get_text_config())
    return f" ({'; '.join(found)})" if found else ""


def refused(config: AnyConfig, why: str) -> ConfigError:
    """Return the error that says why a class is not served."""
    return ConfigError(
        f"{config.source}: model 'transformers' cannot build {config.architecture}: it "
        f"{why.rstrip('.')}{_keys_behind(config, why)}. A plugin that claims the architecture "
        f"can: docs/write-a-plugin.md."
    )
