"""Looks at datasets before a run, and writes them in other forms: `python -m minigpt4 data check|show|convert`."""
