"""How much of a packed batch the language model takes at a time. Without torch: `doctor` reckons with it, too."""

USUAL, LARGE = 1536, 3072
MUCH_MEMORY = 64e9


def piece_rows(fp8: bool = False, memory: float = 0) -> int:
    """Rows that a piece has at most, but for a longer sequence. memory: of the GPU, in bytes.

    More rows are a little quicker and take more memory: 2 % and 4.6e9 bytes at S1/64. Who asks for fp8 asks for speed,
    and gets it where memory is no matter.
    """
    return LARGE if fp8 and memory >= MUCH_MEMORY else USUAL
