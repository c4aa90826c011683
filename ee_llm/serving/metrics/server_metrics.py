"""Metrics of a server in Prometheus's format; vLLM's names where the meaning is the same."""

from collections.abc import Iterable

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from ee_llm.inference.engine_base import EngineBase
from ee_llm.inference.request import FinishReason
from ee_llm.serving.operator.gatekeeper import Gatekeeper
from ee_llm.serving.protocol.ee import LIMITED_FIELDS

_PREFIX = "ee_llm:"

# Seconds. These are vLLM's, with shorter steps of small models.
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_STEP_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)

# vLLM's finish reasons.
_REASONS: dict[FinishReason, str] = {
    "eos": "stop",
    "stop": "stop",
    "length": "length",
    "context": "length",
    "abort": "abort",
    "error": "error",
}


class ServerMetrics:
    """The metrics of one server, in a registry of its own; all have the label model_name.

    Attributes:
        prompt_tokens, generation_tokens: Numbers of tokens of sequences with a first token.
        first_token_s: Time from a request to the first token of each of its sequences.
        inter_token_s: Time from a step with tokens of a sequence to the next one.
        request_s: Time from a request to the end of each of its sequences.
        finished: Finished sequences by finish reason.
        draft_tokens, accepted_tokens: Tokens that `self-speculative` drafted, and those confirmed.
        exit_depth: Layers of each token.
    """

    def __init__(self, model_name: str, engine: EngineBase, gatekeeper: Gatekeeper) -> None:
        prometheus_client.disable_created_metrics()
        self._registry = CollectorRegistry()

        def counter(name: str, text: str) -> Counter:
            made = Counter(_PREFIX + name, text, ("model_name",), registry=self._registry)
            return made.labels(model_name)

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            made = Histogram(
                _PREFIX + name,
                text,
                ("model_name",),
                registry=self._registry,
                buckets=tuple(buckets),
            )
            return made.labels(model_name)

        self.prompt_tokens = counter("prompt_tokens", "Number of prompt tokens processed.")
        self.generation_tokens = counter("generation_tokens", "Number of tokens generated.")
        self.first_token_s = histogram(
            "time_to_first_token_seconds",
            "Seconds from a request to the first token of each of its sequences.",
            _FIRST_TOKEN_S,
        )
        self.inter_token_s = histogram(
            "inter_token_latency_seconds",
            "Seconds between steps that bring tokens of a sequence.",
            _STEP_S,
        )
        self.request_s = histogram(
            "e2e_request_latency_seconds",
            "Seconds from a request to the end of each of its sequences.",
            _REQUEST_S,
        )
        finished = Counter(
            f"{_PREFIX}request_success",
            "Number of ended sequences by the reason of their end.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        by_reason = {one: finished.labels(model_name, one) for one in set(_REASONS.values())}
        self.finished = {reason: by_reason[name] for reason, name in _REASONS.items()}
        self.draft_tokens = counter(
            "spec_decode_num_draft_tokens", "Number of tokens that self-speculation drafted."
        )
        self.accepted_tokens = counter(
            "spec_decode_num_accepted_tokens", "Number of drafted tokens that were confirmed."
        )
        self.exit_depth = histogram(
            "exit_depth", "Number of layers that each token used.", engine.boundaries
        )
        self._registry.register(_State(model_name, engine, gatekeeper))

    def export(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics and their content type, for a request's header Accept."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


class _State(Collector):
    """What the engine and the limits count themselves, read when metrics are exported."""

    def __init__(self, model_name: str, engine: EngineBase, gatekeeper: Gatekeeper) -> None:
        self._model_name = model_name
        self._engine = engine
        self._gatekeeper = gatekeeper

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics."""
        load, gatekeeper, label = self._engine.load, self._gatekeeper, [self._model_name]
        for name, text, value in (
            ("num_requests_running", "Number of sequences that the engine runs.", load.num_running),
            ("num_requests_waiting", "Number of sequences that wait to run.", load.num_waiting),
            ("kv_cache_usage_perc", "Share of the K/V cache in use; 1 is all.", load.cache_usage),
        ):
            gauge = GaugeMetricFamily(_PREFIX + name, text, labels=["model_name"])
            gauge.add_metric(label, value)
            yield gauge
        clamps = CounterMetricFamily(
            f"{_PREFIX}clamps",
            "Number of values that the operator's limits changed, by the field of ee.",
            labels=["model_name", "kind"],
        )
        for field in LIMITED_FIELDS:
            clamps.add_metric([*label, field], gatekeeper.num_clamps[field])
        yield clamps
        audit = gatekeeper.audit
        for name, text, value in (
            (
                "refusals",
                "Number of requests that the operator's limits refused.",
                gatekeeper.num_refusals,
            ),
            (
                "audit_errors",
                "Number of lines that could not be written to the audit log.",
                0 if audit is None else audit.num_errors,
            ),
        ):
            counter = CounterMetricFamily(_PREFIX + name, text, labels=["model_name"])
            counter.add_metric(label, value)
            yield counter
