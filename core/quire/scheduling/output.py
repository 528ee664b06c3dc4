"""What the scheduler tells the runner each step: a difference, in ints and lists, never torch."""

from __future__ import annotations

from attrs import Factory, define, field, frozen

from quire.pooling_params import PoolingInput
from quire.request import SamplingParams, TokenLogprobs


@frozen(kw_only=True)
class KVCacheGroup:
    """Layers that share one block table a sequence.

    `num_blocks` counts block 0, which is never allocated: padding rows write there.
    `window` is the number of latest tokens that the layers read, None for all.
    With `blocks_per_slab` the group's blocks are cut from slabs that all groups share: there are
    `num_blocks` slabs, and the blocks of slab s are s, s + `block_stride`, and so on.
    """

    layers: tuple[int, ...]
    block_size: int
    bytes_per_block: int
    num_blocks: int
    window: int | None = None
    blocks_per_slab: int | None = None
    block_stride: int = 0


@frozen(kw_only=True)
class AddedSequence:
    """A sequence that takes a row: new, or resumed after a preemption.

    `block_tables` holds one list of block ids a group; 0 stands for a block that its window has
    left behind. `token_ids` are all that the host knows.
    A beam gives so many of its most likely tokens as `num_candidates`; 0: it is none.
    With `pooling` it gives a vector.
    """

    sequence_id: int
    request_id: str
    index: int
    row: int
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed_tokens: int
    block_tables: list[list[int]]
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int] = frozenset()
    num_candidates: int = 0
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    pooling: PoolingInput | None = None


@define(kw_only=True)
class SchedulerOutput:
    """One step's difference. Sequences are named by `sequence_id`, a process-wide counter.

    `num_scheduled_tokens` is in the order of the batch: sequences with one token come first.
    `new_block_ids[sequence_id]` are one list a group, appended to its tables before the step.
    `block_copies` are (group, source, destination), done before the step's forward pass.
    `table_changes[sequence_id]` are (group, place, block ids): from that place on a beam's table is
    these. `chosen_token_ids[sequence_id]` stands for the token that was sampled last for a beam.
    `finished` and `preempted` give their rows back before `added` and `resumed` take theirs.
    """

    step_id: int
    added: list[AddedSequence] = Factory(list)
    resumed: list[AddedSequence] = Factory(list)
    finished: list[int] = Factory(list)
    preempted: list[int] = Factory(list)
    new_block_ids: dict[int, list[list[int]]] = Factory(dict)
    block_copies: list[tuple[int, int, int]] = Factory(list)
    table_changes: dict[int, list[tuple[int, int, list[int]]]] = Factory(dict)
    chosen_token_ids: dict[int, int] = Factory(dict)
    num_scheduled_tokens: dict[int, int] = Factory(dict)
    samples: set[int] = field(factory=set)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step, all sequences together."""
        return sum(self.num_scheduled_tokens.values())


@frozen(kw_only=True)
class StepResult:
    """What the runner gives back for one step: sampled tokens and failed rows, by sequence id.

    `logprobs` are of the sampled tokens, a beam's with its candidates, `prompt_logprobs` of the
    prompt's tokens that this step's logits foretell; only of sequences that ask for them. What was
    `pooled` stands for the token of a sequence, whose number then means nothing.
    """

    step_id: int
    token_ids: dict[int, list[int]]
    errors: dict[int, str] = Factory(dict)
    logprobs: dict[int, TokenLogprobs] = Factory(dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = Factory(dict)
    pooled: dict[int, bytes] = Factory(dict)
