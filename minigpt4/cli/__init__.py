"""What `python -m minigpt4 …` and `demo.py` are made of."""
