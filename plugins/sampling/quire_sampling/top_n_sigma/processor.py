"""Keep the tokens whose logits lie within n standard deviations of the highest one."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from quire.interfaces.sampling import LogitsProcessor, LogitsState
from quire.request import SamplingParams
from quire_sampling.rows import AskingRows, Number, numbers_of

NUMBERS = {"n": Number(default=1.0, low=0.0, high=100.0)}


class TopNSigma(LogitsProcessor):
    """Drop every token whose logit is below max - n * sigma, before the temperature.

    Sigma is the standard deviation of the row's finite logits, that of a whole population. What is
    kept does not depend on the temperature.
    Source: Tang et al., "Top-n-sigma: Not all logits are you need", 2024, algorithm 1.
    """

    name: ClassVar[str] = "top_n_sigma"

    def __init__(self, vocab_size: int, max_num_seqs: int, device: str) -> None:
        super().__init__(vocab_size, max_num_seqs, device)
        self._asking = AskingRows(tuple(NUMBERS), max_num_seqs, device)

    @classmethod
    def check_arguments(cls, arguments: Any, params: SamplingParams) -> None:
        """Take `{"n": 1.0}`, from 0 (the best alone) to 100."""
        numbers_of(cls.name, arguments, NUMBERS)

    def add_row(self, row: int, arguments: Any, params: SamplingParams) -> None:
        """Begin to serve a row."""
        asks = arguments is not None
        self._asking.put(row, numbers_of(self.name, arguments, NUMBERS) if asks else None)

    def remove_row(self, row: int) -> None:
        """Forget a row."""
        self._asking.put(row, None)

    def apply(self, logits: Tensor, state: LogitsState) -> Tensor:
        """Set what is dropped to -inf; a row with NaN keeps its values."""
        for chosen in self._asking.choose(state.host_rows):
            own = logits.index_select(0, chosen.places)
            values = own.double()
            lowest = values.amax(1, keepdim=True) - self._asking.column("n", chosen) * _sigma(
                values
            )
            own.masked_fill_(values < lowest, float("-inf"))
            logits.index_copy_(0, chosen.places, own)
        return logits


def _sigma(values: Tensor) -> Tensor:
    """Return the standard deviation of each row's finite values, [num_rows, 1]."""
    is_finite = values.isfinite()
    count = is_finite.sum(1, keepdim=True)
    mean = values.where(is_finite, 0.0).sum(1, keepdim=True) / count
    squares = (values - mean).where(is_finite, 0.0).square().sum(1, keepdim=True)
    return (squares / count).sqrt()
