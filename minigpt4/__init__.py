"""MiniGPT-4: a frozen vision encoder, a frozen language model and one trained linear layer between them."""

from pathlib import Path

from minigpt4.common.registry import registry

__version__ = "0.1.0"

PACKAGE_ROOT = Path(__file__).resolve().parent

registry.register_path("library_root", str(PACKAGE_ROOT))
registry.register_path("repo_root", str(PACKAGE_ROOT.parent))
