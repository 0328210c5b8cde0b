"""Finds what is wrong with a run before its weights are loaded.

A check is a small function: it takes a `RunContext` and yields `Diagnostic`s. Quick checks (paths, sizes, the machine)
do not import torch. The deeper ones run only if those find no error; they use the loaders themselves, whose errors are
theirs.
"""
