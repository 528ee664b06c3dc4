"""One step's inputs. All device tensors are int32 and go up in one packed copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import Factory, define

from quire.interfaces.attention import GraphSupport

if TYPE_CHECKING:
    from torch import Tensor


@define(kw_only=True)
class GroupBatch:
    """The part of a batch that belongs to one KV-cache group.

    `block_table` [num_seqs, max_blocks], contiguous: block ids of each sequence; those beyond its
    length, and those that lie before the window of all its tokens, are 0 or of blocks that are not
    its own. It may be wider than any sequence needs.
    `slot_mapping` [num_tokens]: block_id * block_size + offset of each token's slot.
    """

    block_table: Tensor
    slot_mapping: Tensor


@define(kw_only=True)
class Batch:
    """What a model's forward pass and an attention backend receive; nobody changes it.

    On the device, int32:
        token_ids, positions    [num_tokens]
        cu_seqlens_q            [num_seqs + 1]: where each sequence's tokens begin
        seq_lens                [num_seqs]: tokens of each sequence, this step's included
        logit_rows              [num_logit_rows]: indices of the tokens whose logits are wanted
        rows                    [num_seqs]: persistent row of each sequence
        groups                  one GroupBatch a KV-cache group
        segments                [num_tokens]: 1 in the second text of a pair, else 0; None: no pair
    On the host:
        query_lens              tokens of each sequence in this step
        seq_lens_bound          upper bounds of seq_lens, exact until drafts exist
        num_single_token_seqs   so many sequences, the first, have one token
        padded_to               sequences that the device's tensors have room for: num_seqs, but
                                where a CUDA graph is captured or replayed
        captured_for            batches that the graph serves which is captured or replayed, whose
                                tensors keep their addresses:
                                NONE          there is none
                                SINGLE_TOKEN  each sequence has one token; those that pad have
                                              length 0 and slot 0
                                ANY           padding tokens belong to no sequence and have slot 0;
                                              padding sequences have no tokens and length 0
        in_flight_slot          which staging buffer the step uses, from 0 to max_steps_in_flight
        plans                   what each group's backend planned
    """

    token_ids: Tensor
    positions: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    logit_rows: Tensor
    rows: Tensor
    groups: tuple[GroupBatch, ...]
    query_lens: list[int]
    seq_lens_bound: list[int]
    num_single_token_seqs: int
    padded_to: int
    captured_for: GraphSupport = GraphSupport.NONE
    in_flight_slot: int = 0
    segments: Tensor | None = None
    plans: list[Any] = Factory(list)

    @property
    def num_seqs(self) -> int:
        """Sequences in the batch, padding rows not counted."""
        return len(self.query_lens)

    def rows_to_keep(self) -> Tensor | None:
        """Return `logit_rows` where they are some of the tokens, None where none or all are.

        After its last attention layer a model may go on with these rows alone.
        """
        wanted = self.logit_rows.shape[0]
        return self.logit_rows if 0 < wanted < self.token_ids.shape[0] else None

    def kept(self, hidden: Tensor) -> Tensor:
        """Return the rows to keep of the hidden states of all tokens, or of those rows alone."""
        rows = self.rows_to_keep()
        if rows is None or hidden.shape[0] == rows.shape[0]:
            return hidden
        return hidden.index_select(0, rows)
