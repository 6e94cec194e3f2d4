"""A microservice that charges a student's prepaid balance for an item."""

import os

__version__ = "0.1.0"

# Nothing here needs these, and at its import OpenTelemetry fails on values that it does not know.
for name in ("OTEL_PROPAGATORS", "OTEL_PYTHON_CONTEXT", "OTEL_PYTHON_TRACER_PROVIDER"):
    os.environ.pop(name, None)
