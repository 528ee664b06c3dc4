"""Any causal model of Transformers on the paged KV cache.

    Quire's batch  ->  the class of Transformers, its tokens as one row  ->  Quire's logits
                         its attention function   ->  Quire's attention layers
                         its linear layers        ->  Quire's, of any quantization

What a layer asks of attention is seen by running the class once on `meta`. What does not keep to
keys and values a token - experts, recurrent states, biases of scores - is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quire.errors import ConfigError
from quire.interfaces.batch import Batch
from quire.interfaces.model import AttentionOptions, BuildContext, Model, WeightNames
from quire_models.transformers.config import AnyConfig, transformers_config

ATTENTION = "quire"
# Of attention layers: what they call with queries, keys and values.
CALLED = "_quire_attention"
# Tensors of old checkpoints that hold nothing to load.
IGNORED = (r".*\.rotary_emb\.inv_freq", r".*\.attn\.(bias|masked_bias)")


class Flat(nn.Module):
    """A layer of Quire's where Transformers has one for [..., size]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out_features]."""
        out: Tensor = self.layer(x.reshape(-1, x.shape[-1]))
        return out.view(*x.shape[:-1], -1)


class SharedHead(nn.Module):
    """The head of an embedding that is more than a look-up."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        # Held in a tuple, so that the embedding is not a child of the head in the module tree.
        self._embedding = (embedding,)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [..., vocab_size]."""
        return nn.functional.linear(hidden, self._embedding[0].get_parameter("weight"))


class TransformersModel(Model):
    """A causal model class of Transformers, its layers and its attention exchanged."""

    def __init__(self, config: AnyConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        options = seen_attention(config)
        with parameters_on_meta():
            self.net = make(config)
        self._batch: list[Batch] = []
        self.attention = nn.ModuleList()
        for name, option in options.items():
            layer = build.attention(name, option)
            self.attention.append(layer)
            bind(self.net.get_submodule(name), partial(self._attend, layer))
        ignored = [*IGNORED, *exchange_layers(self.net, config, build)]
        self.weight_names = WeightNames(  # type: ignore[misc]
            renamed={r"^net\.": ""}, ignored=tuple(ignored)
        )
        fill_parameters(self.net, config, build)

    def _attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Any
    ) -> Tensor:
        """Return [1, num_tokens, heads, head_dim] for each of [1, heads, num_tokens, head_dim]."""
        heads = torch.cat((query, key, value), dim=1)[0]
        qkv = heads.transpose(0, 1).reshape(heads.shape[1], -1)
        out: Tensor = layer(qkv, self._batch[0])
        return out.view(1, len(out), query.shape[1], -1)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the embeddings of int32 `token_ids` [num_tokens]."""
        hidden: Tensor = self.net.get_input_embeddings()(token_ids)
        return hidden

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return the last hidden states [num_tokens, hidden_size], final norm included."""
        self._batch[:] = [batch]
        found = self.net.get_decoder()(
            inputs_embeds=hidden[None], position_ids=batch.positions[None].long(), use_cache=False
        )
        last: Tensor = found.last_hidden_state[0]
        return last

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [num_rows, vocab_size]."""
        return behind_decoder(self.net, hidden)


def behind_decoder(net: Any, hidden: Tensor) -> Tensor:
    """Return what the class makes of hidden states [num_rows, hidden_size]: its logits."""
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions as Output

    decoder = net.get_decoder()
    decoder.forward = lambda *_, **__: Output(last_hidden_state=hidden[None])
    try:
        found: Tensor = net(inputs_embeds=hidden[None], use_cache=False).logits[0]
    finally:
        del decoder.forward
    return found


def bind(module: nn.Module, called: Any) -> None:
    """Let a module's attention function call this; it is no child of the module."""
    object.__setattr__(module, CALLED, called)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **options: Any
) -> tuple[Tensor, None]:
    """Serve as an attention function of Transformers."""
    if mask is not None:
        raise ConfigError(f"has {type(module).__name__}, which adds a bias to scores.")
    return getattr(module, CALLED)(query, key, value, options), None


def make(config: AnyConfig) -> Any:
    """Return the class with its random weights. Raises: ConfigError with its own words."""
    import transformers

    transformers.AttentionInterface.register(ATTENTION, attend)
    read = transformers_config(config.architecture, config.given, config.source)
    read._attn_implementation = ATTENTION
    try:
        net = getattr(transformers, config.architecture)(read).eval()
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise _refused(config, f"does not take an attention function: {words}") from error
    if net.get_decoder() in (None, net):
        raise _refused(config, "has no decoder that gives hidden states")
    return net


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


def seen_attention(config: AnyConfig) -> dict[str, AttentionOptions]:
    """Return what each attention layer asks, by its module's name, in the order of calls.

    Raises: ConfigError for what Quire's layers do not do.
    """
    with torch.device("meta"):
        net = make(config)
        tokens = torch.zeros(1, 4, dtype=torch.int64)
    seen: dict[str, AttentionOptions] = {}
    for name, module in net.named_modules():
        bind(module, partial(_look, config, seen, name))
    try:
        net(input_ids=tokens, position_ids=torch.zeros_like(tokens), use_cache=False)
        behind_decoder(net, torch.empty(2, config.hidden_size, device="meta"))
    except ConfigError as error:
        raise _refused(config, str(error)) from error
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise _refused(config, f"does not run on shapes alone: {words}") from error
    if len(seen) != config.num_hidden_layers:
        raise _refused(
            config,
            f"has {config.num_hidden_layers} layers, of which {len(seen)} call Transformers' "
            f"attention interface",
        )
    return seen


def _look(
    config: AnyConfig,
    seen: dict[str, AttentionOptions],
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """Write down what a layer asks."""
    head_dim = query.shape[-1]
    if name in seen:
        raise ConfigError(f"calls {name} twice.")
    if value.shape[-1] != head_dim:
        raise ConfigError(f"has {name} with values of {value.shape[-1]} and keys of {head_dim}.")
    for unknown in ("s_aux", "position_bias"):
        if options.get(unknown) is not None:
            raise ConfigError(f"has {name} with {unknown!r}, which is not passed on.")
    if options.get("is_causal") is False:
        raise ConfigError(f"has {name}, which sees what comes after a token.")
    scale = options.get("scaling")
    seen[name] = AttentionOptions(
        layer_index=len(seen),
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_dim=head_dim,
        scale=head_dim**-0.5 if scale is None else float(scale),
        sliding_window=options.get("sliding_window"),
        logit_softcap=options.get("softcap"),
    )
    return query.new_empty(1, query.shape[2], query.shape[1], head_dim)


def exchange_layers(net: Any, config: AnyConfig, build: BuildContext) -> list[str]:
    """Put Quire's layers in place of plain ones; return patterns of tensors that are not needed."""
    names = {module: name for name, module in net.named_modules()}
    embedding, head = net.get_input_embeddings(), net.get_output_embeddings()
    is_tied = config.tie_word_embeddings and head.weight is embedding.weight
    own: nn.Module | None = None
    if type(embedding) is nn.Embedding:
        own = build.embedding(names[embedding], *embedding.weight.shape)
        net.set_submodule(names[embedding], own)
    patterns = []
    if is_tied and own is None:
        net.set_submodule(names[head], SharedHead(embedding))
        patterns.append(f"{names[head]}\\.weight")
    elif type(head) is nn.Linear and head.bias is None:
        rows, size = head.weight.shape
        made = build.head(names[head], size, rows, tied_to=own if is_tied else None)
        net.set_submodule(names[head], Flat(made))
    elif is_tied:
        raise _refused(config, f"ties {names[head]!r}, which has a bias, to its embedding")
    for module, name in names.items():
        if type(module) is nn.Linear and module is not head:
            inputs, outputs = module.in_features, module.out_features
            linear = build.linear(name, inputs, outputs, bias=module.bias is not None)
            net.set_submodule(name, Flat(linear))
    return patterns


def fill_parameters(net: nn.Module, config: AnyConfig, build: BuildContext) -> None:
    """Give the parameters that are left, and buffers, their memory on the device."""
    seen: dict[int, str] = {}
    for name, module in net.named_modules():
        for own, parameter in list(module._parameters.items()):
            if parameter is None or hasattr(module, "method"):
                continue
            if parameter.dim() > 2:
                raise _refused(config, f"has {name}.{own}, a weight of {parameter.dim()} sizes")
            if id(parameter) in seen:
                raise _refused(config, f"shares {name}.{own} with {seen[id(parameter)]}")
            seen[id(parameter)] = f"{name}.{own}"
            module._parameters[own] = build.parameter(*parameter.shape)
        for own, buffer in list(module._buffers.items()):
            if buffer is not None and torch.device(build.device).type != "meta":
                module._buffers[own] = buffer.to(build.device)


def _refused(config: AnyConfig, why: str) -> ConfigError:
    return ConfigError(
        f"{config.source}: model 'transformers' cannot build {config.architecture}: it "
        f"{why.rstrip('.')}. A plugin that claims the architecture can: docs/write-a-plugin.md."
    )
