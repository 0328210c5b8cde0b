"""Conversations with a model about pictures. The names are imported at first use, so that `--help` loads no torch."""

import importlib

_HOMES = {
    "CONV_VISION": "conversation",
    "Chat": "conversation",
    "Conversation": "conversation",
    "Decoding": "decoding",
    "PictureError": "pictures",
    "open_media": "videos",
    "open_picture": "pictures",
    "open_video": "videos",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
