"""Which tile."""
import torch
from atomcli.kernels.tiles import Tile
def choose(device: torch.device, bits: int, rows: int, blocks: int, tokens: int) -> Tile:
    return Tile(256 if tokens > 64 else 64)
