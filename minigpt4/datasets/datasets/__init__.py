"""The datasets: streams of shards, and a folder with a list of captions."""
