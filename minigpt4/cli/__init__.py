"""The commands of `python -m minigpt4` that chat, caption, serve, cache features and check a run."""
