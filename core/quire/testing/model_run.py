"""Build a tiny model out of the kit's own layers, load it, and run steps through it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from attrs import define, frozen
from torch import Tensor

from quire.interfaces.batch import Batch
from quire.interfaces.model import Model, PoolingModel
from quire.layers.attention import Attention
from quire.layers.build import LayerBuilder
from quire.layers.embedding import Head
from quire.layers.places import Place, own_names, places, places_of_layer
from quire.layers.weights import WeightStore
from quire.testing.attention_cases import make_batch
from quire.testing.dense_attention import LIMITS, DenseAttention
from quire.testing.dense_layers import PlainWeights
from quire.testing.model_cases import WEIGHT, ModelSubject, config_json, given_by

BLOCK_SIZE = 4


@frozen(kw_only=True)
class Names:
    """Tensors that do not fit: wanted and not there, there and not wanted, of other shapes."""

    missing: list[str]
    unexpected: list[str]
    wrong: list[str]


def build(
    subject: ModelSubject,
    given: Mapping[str, object],
    dtype: torch.dtype,
    *,
    batch_invariant: bool = False,
) -> Model:
    """Build the model of a config.json; its parameters are NaN."""
    config = subject.config_class.from_json({"architectures": [subject.architecture], **given})
    builder = LayerBuilder(
        dtype=dtype,
        device=torch.device(subject.device),
        max_model_len=config.longest_model_len,
        quantization=PlainWeights({}),
        dense=PlainWeights({}),
        batch_invariant=batch_invariant,
        generates=given_by(subject) == "logits",
    )
    model = subject.model(config, builder).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False).fill_(float("nan"))
    return model


def load(model: Model, tensors: Mapping[str, Tensor]) -> Names:
    """Fill the model by the checkpoint's names, as the engine does, and let its layers repack."""
    wanted = places(model)
    tied = [m.spec.name for m in model.modules() if isinstance(m, Head) and m.is_tied]
    patterns = [*model.weight_names.ignored, *(re.escape(name) + r"\..*" for name in tied)]
    ignored = {n for n in tensors if any(re.fullmatch(p, n) for p in patterns)}
    own = own_names(tensors, set(wanted), model.weight_names)
    given = {own[name]: tensor for name, tensor in tensors.items() if name not in ignored}
    wrong = []
    for name in sorted(set(given) & set(wanted)):
        view = wanted[name].view()
        if view.shape == given[name].shape:
            view.copy_(given[name])
        else:
            wrong.append(f"{name} {list(given[name].shape)} instead of {list(view.shape)}")
    for module in model.modules():
        if isinstance(module, WeightStore) and not getattr(module, "is_tied", False):
            module.finish_loading()
    return Names(
        missing=sorted(set(wanted) - set(given)),
        unexpected=sorted(set(given) - set(wanted)),
        wrong=wrong,
    )


def tied_names(model: Model) -> set[str]:
    """Return the names under which a checkpoint may hold a tied head's weight again."""
    heads = [m for m in model.modules() if isinstance(m, Head) and m.is_tied]
    return {f"{head.spec.name}.weight" for head in heads}


def doubled_names(model: Model) -> list[str]:
    """Return names of tensors that more than one place asks for."""
    seen: list[str] = []
    for module in model.modules():
        if isinstance(module, WeightStore):
            seen += [name for name, _ in places_of_layer(module)]
    return sorted({name for name in seen if seen.count(name) > 1})


def draw_weights(model: Model, seed: int) -> dict[str, Tensor]:
    """Draw a checkpoint for a model whose real class is not there, by its tensors' names."""
    drawn = {}
    for number, (name, place) in enumerate(sorted(places(model).items())):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        values = WEIGHT * torch.randn(tuple(place.view().shape), generator=generator)
        drawn[name] = values + (1.0 if _is_norm(place) else 0.0)
    return drawn


def _is_norm(place: Place) -> bool:
    return place.owner is None and place.view().dim() == 1


@define(kw_only=True)
class Ready:
    """A model whose attention layers have a backend and a cache."""

    model: Model
    tables: list[list[int]]
    vocab_size: int
    gives: str = "logits"

    def step(self, spans: Sequence[tuple[int, int, int]], sequences: list[list[int]]) -> Batch:
        """Return the batch of (sequence, first, last): positions [first, last) of each."""
        device = str(next(self.model.parameters()).device)
        batch = make_batch(
            [(first, last) for _, first, last in spans],
            [self.tables[i] for i, _, _ in spans],
            BLOCK_SIZE,
            device=device,
        )
        ids = [token for i, first, last in spans for token in sequences[i][first:last]]
        batch.token_ids = torch.tensor(ids, dtype=torch.int32, device=device)
        batch.plans = [batch]
        return batch

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Return the logits of a step, of all its tokens or of those that are wanted.

        Of a model that gives vectors, what stands for them: `outputs` says.
        """
        model = self.model
        return self.outputs(model(model.embed(batch.token_ids), batch), batch)

    def outputs(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return the logits of hidden states; the scores of each sequence; or the states."""
        model = self.model
        if self.gives == "logits":
            return model.logits(hidden)
        if self.gives == "vectors":
            return hidden
        assert isinstance(model, PoolingModel), model
        ends = batch.cu_seqlens_q
        rows = ends[:-1] if model.config.is_encoder else ends[1:] - 1
        return model.scores(hidden.index_select(0, rows.long()))

    def logits(self, sequences: list[list[int]], chunk: int | None = None) -> Tensor:
        """Return the logits [tokens, vocab_size] of all tokens, sequence after sequence.

        With `chunk` each step computes so many tokens of each sequence, the first ones fewer.
        """
        of_sequences = self.gives == "scores"
        done = [0] * len(sequences)
        parts: list[list[Tensor]] = [[] for _ in sequences]
        while any(n < len(s) for n, s in zip(done, sequences, strict=True)):
            spans = []
            for i, sequence in enumerate(sequences):
                size = len(sequence) if chunk is None else max(1, chunk - (i % 2))
                if done[i] < len(sequence):
                    spans.append((i, done[i], min(len(sequence), done[i] + size)))
            # A batch has those with one token first.
            spans.sort(key=lambda span: span[2] - span[1] > 1)
            found = self.forward(self.step(spans, sequences))
            sizes = [1 if of_sequences else last - first for _, first, last in spans]
            split = found.split(sizes)
            for (i, _, last), part in zip(spans, split, strict=True):
                parts[i] = [part] if of_sequences else [*parts[i], part]
                done[i] = last
        return torch.cat([part for one in parts for part in one]).cpu()


def ready(subject: ModelSubject, model: Model, lengths: Sequence[int]) -> Ready:
    """Give each attention layer a backend and a poisoned cache of its own."""
    counts = [-(-length // BLOCK_SIZE) for length in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(5)) + 1
    tables = [part.tolist() for part in order.split(counts)]
    for layer in [m for m in model.modules() if isinstance(m, Attention)]:
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        spec = layer.spec(dtype=dtype, kv_dtype=dtype, block_size=BLOCK_SIZE, device=subject.device)
        layout = DenseAttention.kv_layout(spec)
        cache = torch.full(
            (1 + sum(counts), *layout.block_shape),
            float("nan"),
            dtype=getattr(torch, dtype),
            device=subject.device,
        )
        layer.bind(DenseAttention(spec, LIMITS, {}), cache if spec.causal else None, 0)
    vocab_size = model.config.vocab_size
    gives = given_by(subject)
    return Ready(model=model, tables=tables, vocab_size=vocab_size, gives=gives)


def given_json(subject: ModelSubject, variation: str) -> dict[str, object]:
    """Return the config.json of a variation, as the real class writes it where there is one."""
    saved = subject.made.get(("saved", variation))
    return dict(saved) if saved is not None else config_json(subject, variation)
