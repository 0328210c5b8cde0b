"""MiniGPT-4: a frozen vision encoder, a frozen language model and one trained linear layer between them."""

import importlib
from pathlib import Path

__version__ = "0.1.0"

PACKAGE_ROOT = Path(__file__).resolve().parent

# Says what to use in place of modules that are gone. The name is computed, because that module ranks higher than this.
importlib.import_module(f"{__name__}.common.first_release")
