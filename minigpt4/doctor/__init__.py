"""What can be wrong with a run, found in seconds: files, shapes, texts, the machine, memory and time.

Nothing here imports torch, transformers or timm. A check is a small function that
takes a `RunContext` and yields `Diagnostic`s.
"""
