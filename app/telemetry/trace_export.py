"""The export of spans to a collector, by OTLP over HTTP."""

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from app import __version__

EXPORT_TIMEOUT_SECONDS = 2.0  # an unreachable collector delays the shutdown by this time


@contextmanager
def spans_sent_to(endpoint: str) -> Iterator[None]:
    """Send spans from a separate thread, in batches, until the block ends.

    OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER and the others of
    https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/ apply.
    """
    own = Resource({"service.name": "payment-service", "service.version": __version__})
    provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()))
    exporter = OTLPSpanExporter(f"{endpoint}/v1/traces", timeout=EXPORT_TIMEOUT_SECONDS)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        provider.shutdown()
