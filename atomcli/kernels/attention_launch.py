"""How the attention kernels are run: what is compiled in, grids, shared memory, and room for partial results."""

import functools
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from atomcli.kernels import compiler
from atomcli.kernels.compiler import Defines
from atomcli.kernels.pages import PageFormat
from atomcli.kernels.workspace import workspace

DECODE, PREFILL, APPEND = "attention_decode", "attention_prefill", "append_kv"  # cuda/<name>.cu, and the entry in it
INPUTS = {torch.float32: "float", torch.float16: "fp16", torch.bfloat16: "bf16"}
QUERIES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
HEAD_DIMS = (64, 96, 128, 256)
WARPS = 4
# Bytes of shared memory that one block may have.
SHARED_LIMITS = {
    "80": 163 << 10,
    "86": 99 << 10,
    "89": 99 << 10,
    "90a": 227 << 10,
    "100a": 227 << 10,
    "120a": 99 << 10,
}
# Bytes on their way to an SM: enough for an H100's memory. Twice as many make a queue in front of it, in which those
# accesses wait that a block's beginning and end depend on.
IN_FLIGHT = 64 << 10
LONGEST_PART = 8192  # tokens of a sequence for one block
MOST_PARTS = 128  # of a sequence
CLUSTER = 8  # parts that may be a cluster on every card that has clusters
CLUSTER_CHUNK = 16  # tokens of a warp's chunk then
CLUSTER_TOKENS = 1536  # longest sequence that is quicker in the parts of a cluster than in more
CLUSTER_BLOCKS = 32  # clusters that the card holds beside each other with room to spare
NO_WINDOW = (1 << 31) - 1
MOST_SHARING = WARPS * 8  # query heads of a KV head: the columns of the narrowest prefill kernel
LOG2_E = 1.4426950408889634


class Launchable(Protocol):
    """A loaded kernel: compiler.Kernel, or its stand-in on the host."""

    def launch(
        self, grid: int | tuple[int, ...], block: int, *arguments: Tensor | int | float | None, overlap: bool = False
    ) -> None:
        """Enqueue one launch."""
        ...


class Loader(Protocol):
    """Finds a compiled kernel."""

    def __call__(self, name: str, defines: Defines, shared_bytes: int) -> Launchable: ...


def why_not(fmt: PageFormat, dtype: torch.dtype, keys_rotated: bool = True, group: int = 1) -> str | None:
    """Why no kernel serves these pages and queries, or None where one does."""
    if fmt.head_dim not in HEAD_DIMS:
        return f"the kernels are built for a head_dim of {', '.join(map(str, HEAD_DIMS))}, not of {fmt.head_dim}"
    if dtype not in QUERIES:
        return f"the kernels read bfloat16 or float16 queries, not {dtype}"
    if not keys_rotated:
        return "keys stored before RoPE are rotated by the reference alone"
    if group > MOST_SHARING:
        return f"at most {MOST_SHARING} query heads can share a KV head, not {group}"
    return None


# ----------------------------------------------------------------------------------------------- decode


class BiasKind(NamedTuple):
    """What a kernel is compiled with: whether keys have a bias, and then whether they are in the Hadamard basis."""

    key: bool
    hadamard: bool

    @property
    def defines(self) -> dict[str, int | str]:
        """What the kernels are compiled with."""
        return {"KEY_BIAS": int(self.key), "HADAMARD": int(self.hadamard)}


class Biases(NamedTuple):
    """Projection biases that the cache was filled without, fp32 (kv_heads, head_dim), and what rotates the keys'.

    cos, sin: fp32 (positions, head_dim / 2); hadamard: keys and queries are in the Hadamard basis.
    """

    key: Tensor | None = None
    value: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    hadamard: bool = False

    @property
    def kind(self) -> BiasKind:
        """What of them is compiled in."""
        return BiasKind(self.key is not None, self.key is not None and self.hadamard)

    def arguments(self) -> tuple[Tensor | int | None, ...]:
        """The kernels' arguments."""
        return self.value, self.key, self.cos, self.sin, 0 if self.cos is None else self.cos.shape[0]


NO_BIASES = Biases()


class Appended(NamedTuple):
    """The newest token of each of B sequences, as the projections leave it: what `launch_append` takes besides queries.

    key, value (B, kv_heads, head_dim); cos, sin fp32 (B, head_dim / 2); slots int64 (B,); center fp32 (kv_heads,
    head_dim) or None.
    """

    key: Tensor
    value: Tensor
    cos: Tensor
    sin: Tensor
    slots: Tensor
    center: Tensor | None
    hadamard: bool


class DecodePlan(NamedTuple):
    """One compiled decode kernel: its defines, query heads of a block, shared memory, blocks that fit an SM."""

    defines: Defines
    columns: int
    shared_bytes: int
    blocks_per_processor: int


def _decode_block(fmt: PageFormat, group: int, has_bias: bool = False) -> tuple[int, int]:
    """Query heads of a block, and blocks that fit an SM."""
    columns = 16 if group > 8 and fmt.head_dim <= 128 else 8
    return columns, 2 if columns == 16 or fmt.head_dim > 128 else 3 if has_bias else 4


def plan_decode(
    fmt: PageFormat,
    dtype: torch.dtype,
    group: int,
    shared_limit: int,
    biases: Biases = NO_BIASES,
    cluster: int = 1,
    settled: bool = False,
    chunk: int | None = None,
    appended: Appended | None = None,
) -> DecodePlan:
    """The kernel for `group` query heads per KV head: 8 or 16 columns of an MMA, and a ring for each warp.

    A warp's chunk is 32 tokens of short rows, 16 of long ones. The ring has as many stages as keep IN_FLIGHT bytes on
    their way to an SM, if they fit. The `cluster` parts of a sequence have an inbox each for each other's sums.
    """
    appends = None if appended is None else appended.hadamard
    return _plan_decode(fmt, dtype, group, shared_limit, biases.kind, cluster, settled, chunk, appends)


@functools.cache
def _plan_decode(
    fmt: PageFormat,
    dtype: torch.dtype,
    group: int,
    shared_limit: int,
    biases: BiasKind,
    cluster: int,
    settled: bool,
    chunk: int | None,
    appends: bool | None,
) -> DecodePlan:
    """The plan; `appends`: whether a newest token is rotated into the Hadamard basis, None where there is none."""
    columns, blocks = _decode_block(fmt, group, biases.key)
    chunk = chunk or (32 if fmt.code_bytes <= 64 else 16)
    queries = columns * fmt.head_dim * 2
    if biases.key:
        queries += 2 * fmt.head_dim * ((2 + WARPS) * columns + chunk)
    if appends is not None:
        queries += -(-fmt.bytes_per_token // 128) * 128
    stage = WARPS * chunk * fmt.bytes_per_token
    stages = 1 + -(-IN_FLIGHT // (blocks * stage))
    while stages > 2 and queries + stages * stage > shared_limit:
        stages -= 1
    record = 4 * (fmt.head_dim + 4)
    shared = max(queries + stages * stage, columns * (WARPS * record + 4 * (2 + MOST_PARTS)))
    defines: dict[str, int | str] = {
        "ELEMENT": fmt.element.upper(),
        "HEAD_DIM": fmt.head_dim,
        "PAGE": fmt.page,
        "QUERY": QUERIES[dtype],
        "QUERY_TILES": columns // 8,
        "CHUNK": chunk,
        "WARPS": WARPS,
        "STAGES": stages,
        "BLOCKS_PER_SM": blocks,
        "CLUSTER": cluster,
        "INBOX": shared,
        "SETTLED": int(settled),
        "APPENDS": int(appends is not None),
        **biases.defines,
    }
    if appends is not None:
        defines["HADAMARD"] = int(appends)
    return DecodePlan(Defines(defines), columns, shared + (columns + cluster - 1) * record * (cluster > 1), blocks)


class Parts(NamedTuple):
    """How a sequence is cut: into `wanted` parts, but none of more than `longest` chunks; `most` parts at most."""

    wanted: int
    longest: int
    most: int


def parts_for(places: int, chunks: int, slots: int, chunk: int) -> Parts:
    """Parts of up to `chunks` chunks, so that `places` KV heads fill the `slots` of the card.

    A part has LONGEST_PART tokens at most, so that one long sequence among short ones does not wait for a single block.
    """
    wanted = max(1, min(slots // places, -(-chunks // WARPS), MOST_PARTS))
    longest = max(LONGEST_PART // chunk, -(-chunks // MOST_PARTS))
    return Parts(wanted, longest, max(wanted, -(-chunks // longest)))


def is_one_wave(fmt: PageFormat, batch: int, heads: int, kv_heads: int, processors: int) -> bool:
    """Whether the card holds all blocks of a decode kernel at once: then a second kernel costs more than what a block
    does beside reading the cache."""
    columns, blocks = _decode_block(fmt, heads // kv_heads)
    return batch * kv_heads * -(-heads // kv_heads // columns) <= processors * blocks


def launch_decode(
    load: Loader, query: Tensor, pool: Tensor, fmt: PageFormat, page_table: Tensor, lengths: Tensor, scaling: float,
    window: int | None, biases: Biases, out: Tensor, *, processors: int, shared_limit: int, parts: Parts | None = None,
    cluster: int = 1, chunk: int | None = None, settled: bool = False, appended: Appended | None = None,
) -> None:  # fmt: skip
    """Enqueue the decode kernel; the number of parts depends on shapes alone, never on lengths.

    `parts` of a `cluster` are as many. With `appended` queries are as projected, too, and the newest tokens enter the
    pages on the way.
    """
    query = dense_heads(query)
    (batch, heads, head_dim), kv_heads = query.shape, pool.shape[1]
    plan = plan_decode(fmt, query.dtype, heads // kv_heads, shared_limit, biases, cluster, settled, chunk, appended)
    blocks, chunk = kv_heads * -(-heads // kv_heads // plan.columns), int(plan.defines["CHUNK"])
    if parts is None:
        chunks = -(-page_table.shape[1] * fmt.page // chunk)
        parts = parts_for(batch * blocks, chunks, processors * plan.blocks_per_processor, chunk)
    floats = batch * blocks * parts.most * plan.columns * (head_dim + 4) if parts.most > cluster else 1
    partials, arrivals = scratch(query.device, floats, batch * blocks)
    new: tuple[Tensor | int | None, ...] = (None, None, None, None, 0, 0)
    if appended is not None:
        key, value = dense_heads(appended.key), dense_heads(appended.value)
        new = (key, value, appended.center, appended.slots, key.stride(0), value.stride(0))
        biases = biases._replace(cos=appended.cos, sin=appended.sin)
    load(DECODE, plan.defines, plan.shared_bytes).launch(
        (blocks, parts.most, batch), WARPS * 32, query, pool, page_table, lengths, *biases.arguments(), out, partials,
        arrivals, heads, kv_heads, page_table.stride(0), query.stride(0), NO_WINDOW if window is None else window,
        parts.wanted, parts.longest, scaling * LOG2_E, *new, overlap=True,
    )  # fmt: skip


def in_cluster(batch: int, blocks: int, tokens: int) -> dict[str, Any]:
    """What `launch_decode` is told where the parts of a sequence are best a cluster: one that is short, of few heads.

    Measured on an H100 with 32 heads: 1.5 of 65 us of a block at 1 x 1024. Clusters of 4 at 4 x 1024 cost 5. The
    operators don't ask for it: sums would come in another order than in a batch, and so perhaps another token.
    """
    if batch > 1 or tokens > CLUSTER_TOKENS or blocks > CLUSTER_BLOCKS:
        return {}
    parts = Parts(CLUSTER, -(-tokens // CLUSTER_CHUNK), CLUSTER)
    return {"cluster": CLUSTER, "chunk": CLUSTER_CHUNK, "parts": parts}


# ---------------------------------------------------------------------------------------------- prefill


class PrefillPlan(NamedTuple):
    """One compiled prefill kernel: its defines, columns of a block (a query of a token is one), shared memory."""

    defines: Defines
    columns: int
    shared_bytes: int


def plan_prefill(fmt: PageFormat, dtype: torch.dtype, shared_limit: int, biases: Biases = NO_BIASES) -> PrefillPlan:
    """The kernel whose warps have as many columns as their registers hold the sums of, over a ring of chunks."""
    return _plan_prefill(fmt, dtype, shared_limit, biases.kind)


@functools.cache
def _plan_prefill(fmt: PageFormat, dtype: torch.dtype, shared_limit: int, biases: BiasKind) -> PrefillPlan:
    tiles = 1 if fmt.head_dim > 128 else 2 if biases.key else 3 if fmt.element == "bf16" else 4
    chunk = 64 if fmt.code_bytes <= 64 else 32 if fmt.code_bytes <= 256 else 16
    columns, stages = WARPS * 8 * tiles, 3

    def shared() -> int:
        bias = 2 * fmt.head_dim * (3 * columns + chunk) if biases.key else 0
        return columns * (fmt.head_dim * 2 + 8) + bias + stages * chunk * fmt.bytes_per_token

    while shared() > shared_limit:
        stages, chunk = (stages - 1, chunk) if stages > 2 else (stages, chunk // 2)
    defines: dict[str, int | str] = {
        "ELEMENT": fmt.element.upper(),
        "HEAD_DIM": fmt.head_dim,
        "PAGE": fmt.page,
        "QUERY": QUERIES[dtype],
        "QUERY_TILES": tiles,
        "CHUNK": chunk,
        "WARPS": WARPS,
        "STAGES": stages,
        "BLOCKS_PER_SM": 2,
        **biases.defines,
    }
    return PrefillPlan(Defines(defines), columns, shared())


def launch_prefill(
    load: Loader, query: Tensor, pool: Tensor, fmt: PageFormat, page_table: Tensor, query_starts: Tensor,
    lengths: Tensor, scaling: float, window: int | None, biases: Biases, out: Tensor, *, shared_limit: int,
) -> None:  # fmt: skip
    """Enqueue the prefill kernel: a block for every `columns` queries of a sequence, as many as there could be."""
    query = dense_heads(query)
    (tokens, heads, _), kv_heads, sequences = query.shape, pool.shape[1], len(lengths)
    plan = plan_prefill(fmt, query.dtype, shared_limit, biases)
    queries = plan.columns // (heads // kv_heads)
    blocks = -(-tokens // queries) + min(sequences, tokens) - 1
    load(PREFILL, plan.defines, plan.shared_bytes).launch(
        (blocks, kv_heads), WARPS * 32, query, pool, page_table, query_starts, lengths, *biases.arguments(), out,
        sequences, heads, kv_heads, page_table.stride(0), query.stride(0), NO_WINDOW if window is None else window,
        scaling * LOG2_E, overlap=True,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------- append


@functools.cache
def append_defines(fmt: PageFormat, dtype: torch.dtype, hadamard: bool, rotate_keys: bool) -> Defines:
    """What is compiled into the append kernel."""
    defines: dict[str, int | str] = {
        "ELEMENT": fmt.element.upper(),
        "HEAD_DIM": fmt.head_dim,
        "PAGE": fmt.page,
        "INPUT": INPUTS[dtype],
        "HADAMARD": int(hadamard),
        "ROTATE_KEYS": int(rotate_keys),
        "WARPS": WARPS,
    }
    return Defines(defines)


def launch_append(
    load: Loader, pool: Tensor, fmt: PageFormat, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor,
    slots: Tensor, hadamard: bool, rotate_keys: bool, center: Tensor | None, rotated: Tensor,
) -> None:  # fmt: skip
    """Enqueue the append kernel: head_dim / 16 lanes for each head of each token."""
    (tokens, heads, head_dim), kv_heads = query.shape, pool.shape[1]
    query, key, value = (dense_heads(x) for x in (query, key, value))
    grid = (tokens, -(-(heads + 2 * kv_heads) // (WARPS * (512 // head_dim))))
    load(APPEND, append_defines(fmt, query.dtype, hadamard, rotate_keys), 0).launch(
        grid, WARPS * 32, pool, query, key, value, cos, sin, center, slots, rotated,
        heads, kv_heads, query.stride(0), key.stride(0), value.stride(0), overlap=True,
    )  # fmt: skip


def dense_heads(x: Tensor) -> Tensor:
    """x (tokens, heads, head_dim) whose heads lie one after the other, in pieces of 16 bytes that copies can take.

    Tokens may be apart, as in a merged product.
    """
    dense = x.stride(2) == 1 and x.stride(1) == x.shape[2]
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x if dense and aligned else x.clone(memory_format=torch.contiguous_format)


# -------------------------------------------------------------------------------------------- workspace


def scratch(device: torch.device, floats: int, arrivals: int) -> tuple[Tensor, Tensor]:
    """Room for partial results, and counters that are zero between launches."""
    if device.type != "cuda":
        return torch.full((floats,), float("nan")), torch.zeros(arrivals, dtype=torch.int32)
    space = workspace(device, "attention", floats, arrivals)
    return space.partials, space.flags


def load_on(device: torch.device) -> Loader:
    """Kernels of a card."""

    def load(name: str, defines: Defines, shared_bytes: int) -> Launchable:
        return compiler.load_kernel(f"{name}.cu", name, device, defines, shared_bytes)

    return load
