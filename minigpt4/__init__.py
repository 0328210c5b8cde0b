"""MiniGPT-4: a frozen vision encoder, a frozen language model and one trained linear layer between them."""

from pathlib import Path

__version__ = "0.1.0"

PACKAGE_ROOT = Path(__file__).resolve().parent
