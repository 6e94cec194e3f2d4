"""A microservice that charges a student's prepaid balance for an item."""

import os

__version__ = "0.1.0"

# The service does not use these variables. At import, OpenTelemetry fails on unknown values.
for name in ("OTEL_PROPAGATORS", "OTEL_PYTHON_CONTEXT", "OTEL_PYTHON_TRACER_PROVIDER"):
    os.environ.pop(name, None)
