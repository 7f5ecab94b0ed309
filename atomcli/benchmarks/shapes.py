"""The shapes that benches and GPU tests draw from: out_features × in_features of linear layers."""

import random

SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "llama-7b": ((4096, 4096), (22016, 4096), (4096, 11008)),
    "llama-70b": ((10240, 8192), (28672, 8192)),
}
BATCH_SIZES = (1, 16, 64, 128, 256, 1024, 4096)


def default_shapes() -> list[tuple[int, int]]:
    """Every shape above, smallest models first."""
    return [shape for shapes in SHAPES.values() for shape in shapes]


def ragged(seed: int, count: int) -> list[tuple[int, int, int, int]]:
    """Random (tokens, out_features, in_features, outliers) that no tile divides: odd tokens, ragged last groups."""
    draw = random.Random(seed)
    return [
        (
            draw.choice((1, 2, 7, 9, 17, 33, 63, 65, 127, 129, 255, 257, 300, 513)),
            draw.choice((8, 72, 100, 129, 320, 640, 1001)),
            128 * draw.randint(0, 9) + draw.choice((129, 192, 256, 200)),
            draw.choice((0, 64, 128)),
        )
        for _ in range(count)
    ]
