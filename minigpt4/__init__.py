"""MiniGPT-4: a frozen vision encoder, a frozen language model and one trained linear layer between them."""

import importlib
from pathlib import Path

__version__ = "0.1.0"

PACKAGE_ROOT = Path(__file__).resolve().parent

# The first ends a program on an older Python. The second says what to use in place of modules that are gone. The names
# are computed, because these modules rank higher than this.
for module in ("python_version", "first_release"):
    importlib.import_module(f"{__name__}.common.{module}")
