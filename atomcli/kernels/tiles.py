"""Tiles of the integer GEMM: the compile-time parameters of cuda/gemm_sm90a.cuh, and how tiles are dealt to a grid."""

from dataclasses import dataclass

import torch

from atomcli.kernels.layouts import BLOCK, ROW_GROUP, Kind

OUTPUTS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
WARPGROUP = 128
SHARED_LIMIT = 227 << 10


@dataclass(frozen=True)
class Tile:
    """The compile-time parameters of cuda/gemm_sm90a.cuh, and how tiles are dealt to the blocks of the grid.

    `split`: "none" deals whole tiles in turn, "remainder" cuts up those of the last wave, "all" cuts up every tile.
    `blocks`: blocks of the grid; 0 for as many as fit on the card. `fragments`: 2 unpacks a block ahead, where 0 leaves
    it to the registers: two for few consumers or few tokens.
    """

    tokens: int
    row_groups: int = 2
    k_groups: int = 1
    stages: int = 5
    stage_blocks: int = 1
    cluster: int = 1
    blocks_per_sm: int = 1
    split: str = "none"
    blocks: int = 0
    fragments: int = 0

    @property
    def rows(self) -> int:
        """Output channels of a tile."""
        return self.row_groups * ROW_GROUP

    @property
    def threads(self) -> int:
        """Threads of a block: the consumers' warpgroups and a producer, which is a whole one where registers move."""
        return self.row_groups * self.k_groups * WARPGROUP + (WARPGROUP if self.blocks_per_sm == 1 else 64)

    @property
    def roomy(self) -> bool:
        """Whether a consumer's thread has more than 200 registers."""
        return self.blocks_per_sm == 1 and self.row_groups * self.k_groups <= 2

    def shared_bytes(self, weight_bytes: int, planes: int = 1) -> int:
        """Dynamic shared memory, by the same formula as in the source; `planes` of 128 bytes are a block of a token."""
        stage = self.stage_blocks * (self.tokens * BLOCK * planes + self.row_groups * weight_bytes)
        exchange = (self.k_groups - 1) * self.row_groups * ROW_GROUP * self.tokens * 4
        store = self.row_groups * 2 * min(self.tokens, 32 if self.roomy and self.cluster == 1 else 16) * 144
        return 1024 + self.stages * (-(-stage // 1024) * 1024) + exchange + store

    def defines(self, output: torch.dtype, experts: int = 0) -> dict[str, int | str]:
        """What the source is compiled with; `experts` 0 for a single weight."""
        names = ("tokens", "row_groups", "k_groups", "stages", "stage_blocks", "cluster", "blocks_per_sm")
        fragments = self.fragments or (2 if self.roomy or self.tokens <= 16 else 1)
        parameters = {name.upper(): getattr(self, name) for name in names}
        return parameters | {"FRAGMENTS": fragments, "EXPERTS": experts, "OUTPUT": OUTPUTS[output]}


def source(kind: Kind) -> str:
    """The file in cuda/ for weights of a kind."""
    return f"gemm_{kind}_sm90a.cu"


def deal(tile: Tile, tiles: int, multiprocessors: int) -> tuple[int, int]:
    """Blocks of the grid, and how many (clusters of) tiles are cut up among them, for `tiles` tiles in all."""
    grid = (tile.blocks or multiprocessors * tile.blocks_per_sm) // tile.cluster * tile.cluster
    clusters, clustered_tiles = grid // tile.cluster, tiles // tile.cluster
    if tile.split == "none":
        return min(grid, tiles), 0
    return grid, clustered_tiles if tile.split == "all" else clustered_tiles % clusters
