"""`bench serve` with a small model: a server of its own, and clients that ask any server."""

import json
import time

import pytest

from minigpt4.__main__ import main
from minigpt4.benchmarks import serve


@pytest.mark.slow
def test_clients_ask_at_the_same_time(capsys, monkeypatch):
    monkeypatch.setattr(serve, "WARMUP_SECONDS", 0.1)
    monkeypatch.setattr(serve, "NEW_TOKENS", (3, 9))
    start = time.perf_counter()
    with serve.serving(small=True, max_batch=2, clients=3) as url:
        assert not main(["bench", "serve", "--url", url, "--clients", "3", "--seconds", "1", "--json"])
    (row,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert row["clients"] == 3 <= row["answers"] and row["tokens_per_s"] > 0
    assert 0 < row["first_token_s"] <= row["first_token_p99_s"] < time.perf_counter() - start
    assert 0 < row["gap_p99_s"] < 10
