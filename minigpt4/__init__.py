"""MiniGPT-4: a frozen vision encoder, a frozen language model and one trained linear layer between them."""

import importlib
import sys
from pathlib import Path

__version__ = "0.1.0"

PACKAGE_ROOT = Path(__file__).resolve().parent

# The last finder says what to use in place of modules that are gone. Its name is computed: it ranks higher than this.
sys.meta_path.append(importlib.import_module(f"{__name__}.common.first_release"))
