"""What `python -m minigpt4 …` and `demo.py` are made of."""


def print_help(usage: str, commands: dict[str, str]) -> None:
    """Print how the program is called, and what its commands do."""
    print(usage.strip())
    print("\ncommands (each has its own --help):")
    width = max(map(len, commands))
    for name, text in commands.items():
        print(f"  {name:{width}}  {text}")
