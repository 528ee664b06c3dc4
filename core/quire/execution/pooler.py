"""From hidden states to one vector a sequence: pooling, the modules after it, or a score head."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as functional
from attrs import frozen
from torch import Tensor, nn

from quire.errors import CheckpointError
from quire.execution.checkpoint import Checkpoint
from quire.interfaces.model import Model, PoolingModel
from quire.pooling_setup import CLASSIFY, DenseModule, PoolingSetup


@frozen(kw_only=True)
class Pieces:
    """Sequences whose tokens lie end to end: how many each has, and how many pooling leaves out."""

    lengths: list[int]
    skipped: list[int]

    def lasts(self) -> list[int]:
        """Return the row of each sequence's last token."""
        return (np.cumsum(self.lengths) - 1).tolist()

    def firsts(self) -> list[int]:
        """Return the row of each sequence's first token."""
        return (np.cumsum(self.lengths) - self.lengths).tolist()

    def firsts_kept(self) -> list[int]:
        """Return the row of each sequence's first token that pooling does not leave out."""
        return [first + out for first, out in zip(self.firsts(), self.skipped, strict=True)]


class Pooler:
    """Make vectors, or scores, of a model's hidden states. Works in float32."""

    def __init__(self, model: Model, setup: PoolingSetup) -> None:
        """Load the weights of dense modules. Raises: CheckpointError."""
        self.setup = setup
        self._model = model
        device = next(model.parameters()).device
        self._modules = [
            _load_dense(module, device) if isinstance(module, DenseModule) else _normalise
            for module in setup.modules
        ]
        self._check_sizes(model.config.hidden_size)

    def _check_sizes(self, hidden_size: int) -> None:
        size = hidden_size * len(self.setup.kinds)
        for module in self.setup.modules:
            if isinstance(module, DenseModule):
                if module.in_features != size:
                    raise CheckpointError(
                        f"{module.folder}: in_features is {module.in_features}; what comes before "
                        f"gives vectors of {size}."
                    )
                size = module.out_features

    def last(self, rows: Tensor) -> Tensor:
        """Return what is made of the sequences' last tokens, `rows` [num_seqs, hidden_size]."""
        return self._finish(rows)

    def whole(self, hidden: Tensor, pieces: Pieces) -> Tensor:
        """Return what is made of all tokens of sequences, `hidden` [num_tokens, hidden_size]."""
        found = [self._pooled(kind, hidden, pieces) for kind in self.setup.kinds]
        return self._finish(found[0] if len(found) == 1 else torch.cat(found, dim=-1))

    def _finish(self, pooled: Tensor) -> Tensor:
        if self.setup.task == CLASSIFY:
            assert isinstance(self._model, PoolingModel), "checked at the start"
            return self._model.scores(pooled).float()
        pooled = pooled.float()
        for module in self._modules:
            pooled = module(pooled)
        return pooled

    def _pooled(self, kind: str, hidden: Tensor, pieces: Pieces) -> Tensor:
        if kind in ("cls", "lasttoken"):
            rows = pieces.firsts_kept() if kind == "cls" else pieces.lasts()
            return hidden.index_select(0, torch.tensor(rows, device=hidden.device))
        lengths = torch.tensor(pieces.lengths, device=hidden.device)
        wide = hidden.float()
        weights = None
        if kind == "weightedmean":
            ranks = [np.arange(1, length + 1, dtype=np.float32) for length in pieces.lengths]
            weights = torch.from_numpy(np.concatenate(ranks)).to(hidden.device)
        if any(pieces.skipped):
            kept = torch.from_numpy(_kept_rows(pieces)).to(hidden.device)
            wide, lengths = wide[kept], lengths - torch.tensor(pieces.skipped, device=kept.device)
            weights = None if weights is None else weights[kept]
        return _reduced(kind, wide, lengths, weights)


def _reduced(kind: str, wide: Tensor, lengths: Tensor, weights: Tensor | None) -> Tensor:
    """Return one vector for each run of `lengths` rows."""

    def reduced(how: str, values: Tensor) -> Tensor:
        return torch.segment_reduce(values, how, lengths=lengths, axis=0, unsafe=True)

    if weights is not None:
        return reduced("sum", wide * weights[:, None]) / reduced("sum", weights)[:, None]
    if kind == "mean_sqrt_len":
        return reduced("sum", wide) / lengths.float().sqrt()[:, None]
    return reduced(kind, wide)


def _kept_rows(pieces: Pieces) -> np.ndarray:
    """Return the rows that pooling does not leave out."""
    counts = zip(pieces.firsts(), pieces.lengths, pieces.skipped, strict=True)
    return np.concatenate([np.arange(first + out, first + n) for first, n, out in counts])


def _normalise(x: Tensor) -> Tensor:
    return functional.normalize(x, dim=-1)


def _load_dense(module: DenseModule, device: torch.device) -> nn.Module:
    from safetensors.torch import load_file

    checkpoint = Checkpoint.open(module.folder)
    shapes: dict[str, tuple[int, ...]] = {
        "linear.weight": (module.out_features, module.in_features)
    }
    if module.bias:
        shapes["linear.bias"] = (module.out_features,)
    given = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    if given != shapes:
        raise CheckpointError(f"{module.folder}: has tensors {given}; config.json says {shapes}.")
    layer = nn.Linear(module.in_features, module.out_features, module.bias, device=device)
    for file in {tensor.file for tensor in checkpoint.tensors.values()}:
        for name, tensor in load_file(file).items():
            layer.get_parameter(name.removeprefix("linear.")).data.copy_(tensor)
    activation: nn.Module = getattr(nn, module.activation)()
    return nn.Sequential(layer, activation).requires_grad_(False)
