"""The contract of an attention backend: plan once a step, then write and attend once a layer."""

from __future__ import annotations

import abc
import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from attrs import frozen

if TYPE_CHECKING:
    from torch import Tensor

    from quire.interfaces.batch import Batch


NOT_INVARIANT = "it does not declare batch_invariant, which --deterministic asks for"
# A number of such a cache stands for itself times its head's scale.
QUANTIZED_KV_DTYPES = ("float8_e4m3fn", "float8_e5m2")


class GraphSupport(enum.StrEnum):
    """Which batches a backend can run inside a CUDA graph: `Batch.captured_for` says how.

    There `plan` returns what keeps shapes and addresses whatever the lengths are, and `attend`
    leaves what belongs to no sequence as it is.
    """

    NONE = "none"
    SINGLE_TOKEN = "single-token"
    UNIFORM = "uniform"
    ANY = "any"


@frozen(kw_only=True)
class LatentSpec:
    """Sizes of multi-head latent attention: one compressed part and one rotated part a token."""

    kv_lora_rank: int
    rope_head_dim: int
    nope_head_dim: int


@frozen(kw_only=True)
class AttentionSpec:
    """What the layers of one KV-cache group need; the same for all of them.

    Heads are this rank's. `scale` multiplies the scores. `sliding_window` is the number of latest
    tokens that a token sees, itself included. `logit_softcap` c means c * tanh(score / c).
    Dtypes and device are spelled as in torch, without `torch.`. `kv_dtype` is what the cache holds:
    with one of `QUANTIZED_KV_DTYPES` layers have scales, and a backend has to declare it.
    `batch_invariant`: a token's output must have the same bits whatever else is in the step, and
    however many tokens of its own sequence are.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    scale: float
    dtype: str
    kv_dtype: str
    block_size: int
    device: str
    sliding_window: int | None = None
    logit_softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    latent: LatentSpec | None = None
    causal: bool = True
    batch_invariant: bool = False

    @property
    def has_quantized_kv(self) -> bool:
        """Whether the cache holds numbers that have to be multiplied by scales."""
        return self.kv_dtype in QUANTIZED_KV_DTYPES


@frozen(kw_only=True)
class BatchLimits:
    """The largest batch that a backend will see."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_steps_in_flight: int = 1


@frozen(kw_only=True)
class KVLayout:
    """How one KV block lies in memory: the cache is `[num_blocks, *block_shape]` of `dtype`.

    Contiguous, and 256 bytes aligned; ids that no table names may be other layers' blocks.
    Two backends share a cache if name, shape and dtype agree. The core copies whole blocks.
    """

    name: str
    block_shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name!r} ({list(self.block_shape)} of {self.dtype} a block)"


class AttentionLayer(Protocol):
    """What `write` and `attend` may read of the layer they work for.

    `k_scale` and `v_scale` are float32 [num_kv_heads] for a quantized cache: a key x is stored as
    the number nearest to x / k_scale[head], which is float32, of the cache's dtype; what is beyond
    its largest finite number becomes that one, a NaN stays a NaN. `sinks` and `alibi_slopes` are
    float32 [num_heads]. Each is None where the spec does not ask for it.
    """

    @property
    def index(self) -> int: ...
    @property
    def k_scale(self) -> Tensor | None: ...
    @property
    def v_scale(self) -> Tensor | None: ...
    @property
    def sinks(self) -> Tensor | None: ...
    @property
    def alibi_slopes(self) -> Tensor | None: ...


class AttentionBackend(abc.ABC):
    """Compute attention for one KV-cache group of one rank.

    `plan` may only enqueue work on the current stream and never reads the device; `prepare` is
    its device part, captured at the head of a CUDA graph; its tensors keep their addresses.
    `write`, `attend` and `rotate_and_write` never wait for the device.

    `batch_invariant`: it serves specs that ask for it; those that do not may be served faster.
    `quantized_kv` are those of `QUANTIZED_KV_DTYPES` that it writes and reads with scales.
    """

    graph_support: ClassVar[GraphSupport] = GraphSupport.NONE
    batch_invariant: ClassVar[bool] = False
    quantized_kv: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abc.abstractmethod
    def why_unsupported(cls, spec: AttentionSpec) -> str | None:
        """Return None if the backend can serve the spec, else why not, in a sentence."""

    @classmethod
    @abc.abstractmethod
    def kv_layout(cls, spec: AttentionSpec) -> KVLayout:
        """Return the layout of one KV block of one layer."""

    @classmethod
    def workspace_bytes(cls, spec: AttentionSpec, limits: BatchLimits) -> int:
        """Return the bytes of device memory that an instance holds, for the memory budget."""
        return 0

    def __init__(
        self, spec: AttentionSpec, limits: BatchLimits, options: Mapping[str, Any]
    ) -> None:
        """Prepare for batches within `limits`; `options` are checked against the declared ones."""
        self.spec = spec
        self.limits = limits
        self.options = options

    @abc.abstractmethod
    def plan(self, batch: Batch, group: int) -> Any:
        """Return what the layers of `batch.groups[group]` share in this step."""

    def prepare(self, plan: Any) -> None:  # noqa: B027 - optional
        """Enqueue the plan's device part; called before the first layer of the step."""

    @abc.abstractmethod
    def write(
        self, layer: AttentionLayer, k: Tensor, v: Tensor, kv_cache: Tensor, plan: Any
    ) -> None:
        """Store keys and values of the step's tokens in their slots.

        `k` [num_tokens, num_kv_heads, head_dim], `v` [num_tokens, num_kv_heads, value_head_dim];
        both may be strided. Changes `kv_cache` in the slots of the batch and nowhere else, but
        for block 0, where padding may be written.
        """

    @abc.abstractmethod
    def attend(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: Tensor | None,
        plan: Any,
        out: Tensor,
        lse: Tensor | None = None,
    ) -> None:
        """Fill `out` [num_tokens, num_heads, value_head_dim] with the attention of each token.

        `q` [num_tokens, num_heads, head_dim]. Keys and values come from the cache, the step's own
        included; from `k` and `v` alone where `kv_cache` is None (an encoder). `lse`, where
        given, receives the float32 log-sum-exp of the scores, [num_tokens, num_heads].
        """

    def rotate_and_write(
        self,
        layer: AttentionLayer,
        qkv: Tensor,
        positions: Tensor,
        rotary: Any,
        qk_norm: Any,
        kv_cache: Tensor,
        plan: Any,
    ) -> Tensor | None:
        """Normalise, rotate and write in one pass; return q, or None: not offered.

        `qkv` [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], `rotary` a
        `quire.layers.rotary.RotaryTable` or None, `qk_norm` a `quire.layers.attention.QKNorm` or
        None. The core does the three steps itself where None comes back.
        """
        return None


def why_refused(backend: type[AttentionBackend], spec: AttentionSpec) -> str | None:
    """Return None if a backend can serve the spec, else why not, in a sentence.

    Its own `why_unsupported` is not asked about a quantized cache that it does not declare: a
    backend that is older than such caches would read stored numbers for true ones. Nor is it asked
    about batch invariance, which is declared or not.
    """
    if spec.batch_invariant and not backend.batch_invariant:
        return NOT_INVARIANT
    if spec.has_quantized_kv and spec.kv_dtype not in backend.quantized_kv:
        return f"it has no {spec.kv_dtype} KV cache: its `quantized_kv` does not name it"
    return backend.why_unsupported(spec)
