"""The endpoint's figures in Prometheus' text format, through `prometheus-client`."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE

from minigpt4.serving.answer import Answer

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


class Metrics:
    """The figures of one endpoint.

    Args:
        gauges: functions that return a present number, by name.
    """

    def __init__(self, gauges: dict[str, Callable[[], float]]):
        self._registry = registry = CollectorRegistry()
        for name, read in gauges.items():
            Gauge(f"minigpt4_{name}", f"Present number: {name}.", registry=registry).set_function(read)
        self._requests = Counter("minigpt4_responses", "Responses by HTTP status.", ["status"], registry=registry)
        self._prompt = Counter("minigpt4_prompt_tokens", "Tokens of prompts, pictures included.", registry=registry)
        self._new = Counter("minigpt4_completion_tokens", "Tokens of answers.", registry=registry)
        self._first = Histogram(
            "minigpt4_first_token_seconds", "From a request to its first token.", buckets=SECONDS, registry=registry
        )
        self._whole = Histogram(
            "minigpt4_request_seconds", "From a request to its end.", buckets=SECONDS, registry=registry
        )

    def count_response(self, status: int) -> None:
        self._requests.labels(status).inc()

    def count_answers(self, start: float, answers: list[Answer]) -> None:
        """Called at the end of a request that came at `start` (`time.monotonic()`)."""
        self._prompt.inc(answers[0].prompt.num_tokens)
        self._new.inc(sum(len(answer.ids) for answer in answers))
        first = [answer.first_token_at for answer in answers if answer.first_token_at is not None]
        if first:
            self._first.observe(min(first) - start)
        self._whole.observe(time.monotonic() - start)

    def text(self) -> tuple[bytes, str]:
        """All figures, and their content type."""
        return generate_latest(self._registry), CONTENT_TYPE
