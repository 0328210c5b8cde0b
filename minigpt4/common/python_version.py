"""Ends a program on a Python that is too old, before it misses a library. Python 3.6 can read this file, too."""

import sys

LEAST_PYTHON = (3, 11)

if sys.version_info < LEAST_PYTHON:
    sys.exit(
        "Error: MiniGPT-4 needs Python {}.{} or newer; {} is {}.{}. Make an environment with a newer one, as in\n"
        "  python3.12 -m venv .venv && . .venv/bin/activate\n"
        "  pip install --constraint requirements.lock --editable .\n"
        "or with conda: conda env create -f environment.yml (docs/installation.md).".format(
            *LEAST_PYTHON, sys.executable, *sys.version_info[:2]
        )
    )
