"""Masks of limited rows: where the host fills them, and how they forbid tokens on the device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BITS = 32
BYTE = 8


class _Copies:
    """Copies to one place on a GPU, made beside what runs there: a forward pass."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._read, self._sent = torch.cuda.Event(), torch.cuda.Event()
        self.note_read()

    def send(self, source: Tensor, to: Tensor) -> None:
        """Enqueue a copy for what is enqueued from now on; it waits for readers of the last."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._read)
            to.copy_(source, non_blocking=True)
            self._sent.record()
        torch.cuda.current_stream().wait_event(self._sent)

    def note_read(self) -> None:
        """Note that all was enqueued that reads what was sent last."""
        self._read.record()


class GrammarMasks:
    """A bit a token for the limited rows of one step, for any of them up to `num_rows`.

    Both sides hold, in one piece, so that one copy takes all that a step needs:

        which mask each row of the logits has [num_rows]; mask 0, which allows all; masks 1, 2, ..

    A host buffer is written again after `num_buffers` steps, when its copy has long been made.
    Nothing is allocated before the first step with a limited row.
    """

    def __init__(
        self, vocab_size: int, num_rows: int, num_buffers: int, device: torch.device
    ) -> None:
        self._vocab_size = vocab_size
        self._num_words = (vocab_size + BITS - 1) // BITS
        self._num_rows = num_rows
        self._num_buffers = num_buffers
        self._device = device
        self._buffers: list[Tensor] = []
        self._turn = 0
        self._on_device: Tensor | None = None
        self._flags: Tensor | None = None  # of each byte: 1 where a bit is not set
        self._copies: _Copies | None = None

    def begin(self, count: int) -> NDArray[np.int32]:
        """Return where the next step's `count` masks are written, [count, words]."""
        if not self._buffers:
            self._allocate()
        self._turn = (self._turn + 1) % self._num_buffers
        masks = self._buffers[self._turn].numpy()[self._num_rows :].reshape(-1, self._num_words)
        return masks[1 : 1 + count]

    def _allocate(self) -> None:
        size = self._num_rows + (self._num_rows + 1) * self._num_words
        is_cuda = self._device.type == "cuda"
        for _ in range(self._num_buffers):
            buffer = torch.zeros(size, dtype=torch.int32, pin_memory=is_cuda)
            buffer[self._num_rows : self._num_rows + self._num_words] = -1
            self._buffers.append(buffer)
        self._on_device = torch.zeros(size, dtype=torch.int32, device=self._device)
        if is_cuda:
            self._copies = _Copies(self._device)
        every_byte = np.arange(2**BYTE, dtype=np.uint8)[:, None]
        flags = np.unpackbits(~every_byte, axis=1, bitorder="little").view(np.int64)
        self._flags = torch.from_numpy(flags).flatten().to(self._device)

    def one(self) -> NDArray[np.int32]:
        """Return an empty mask."""
        return np.zeros(self._num_words, np.int32)

    def send(self, which: list[int], count: int) -> None:
        """Enqueue the copy of the masks that were begun last, and which of them each row has.

        What reads them is enqueued next, and `note_read` is called behind it.
        """
        assert self._on_device is not None, "a step was begun"
        buffer = self._buffers[self._turn]
        choice = buffer.numpy()[: self._num_rows]
        choice[: len(which)] = which
        choice[len(which) :] = 0
        size = self._num_rows + (count + 1) * self._num_words
        if self._copies is None:
            self._on_device[:size].copy_(buffer[:size])
            return
        self._copies.send(buffer[:size], self._on_device[:size])

    def note_read(self) -> None:
        """Note that all was enqueued that reads the masks which were sent last."""
        if self._copies is not None:
            self._copies.note_read()

    def forbid(self, logits: Tensor) -> Tensor:
        """Set to -inf what the masks forbid that were sent last, in logits [rows, vocab_size].

        They are changed in place. May be captured: the masks are always at the same place.
        """
        assert self._on_device is not None, "masks were sent"
        assert self._flags is not None, "masks were sent"
        choice, masks = self._on_device.tensor_split([self._num_rows])
        own = masks.view(-1, self._num_words).index_select(0, choice[: len(logits)])
        # A byte's eight flags are looked up at once: a sixth of the bytes moved by shifting bits.
        found = self._flags.index_select(0, own.view(torch.uint8).flatten().int())
        forbidden = found.view(torch.bool).view(len(logits), -1)[:, : self._vocab_size]
        return logits.masked_fill_(forbidden, float("-inf"))

    def forbid_on_host(self, logits: Tensor, masks: NDArray[np.int32]) -> Tensor:
        """Do it with masks [rows, words] on a CPU, without a copy of them."""
        # As whole numbers, by numpy: 75 us for 64 rows of 4,096 tokens, and 135 by masked_fill_.
        flags = np.unpackbits(~masks.view(np.uint8), axis=1, bitorder="little")
        integer = torch.int32 if logits.element_size() == 4 else torch.int16
        least = torch.tensor(float("-inf"), dtype=logits.dtype).view(integer).item()
        where = flags.view(np.bool_)[:, : self._vocab_size]
        np.copyto(logits.view(integer).numpy(), least, where=where)
        return logits
