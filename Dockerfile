# The first stage installs; the second has only what runs: no pip cache, no compiler, no tests.
# The environment has no pip and setuptools, because it is copied as a whole.
FROM python:3.11-slim AS build
# Install only files with a known hash, and none that would have to be built.
COPY requirements.lock .
RUN python -m venv --without-pip /venv \
    && pip --python /venv/bin/python install --no-cache-dir --disable-pip-version-check \
       --only-binary :all: --require-hashes -r requirements.lock
WORKDIR /service
COPY app app
# The files of a checkout may be readable for their owner only, and the service runs as another user.
# The root filesystem is read-only in use, so compile the bytecode now.
RUN chmod -R a+rX app && /venv/bin/python -m compileall -q app

FROM python:3.11-slim
ENV PATH=/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
COPY --from=build /venv /venv
COPY --from=build /service /service
WORKDIR /service
# A number, so that Kubernetes can verify that it is not root.
USER 10001:10001
EXPOSE 8002
# Use no proxy: a proxy that Docker sets for the container cannot reach the container's loopback.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "from urllib.request import ProxyHandler, build_opener; build_opener(ProxyHandler({})).open('http://127.0.0.1:8002/health', timeout=2)"]
CMD ["python", "-m", "app", "--port", "8002"]
# Last, because they change with every build: --build-arg REVISION=$(git rev-parse HEAD)
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="payment-service" \
      org.opencontainers.image.description="Charges a student's prepaid balance for an item" \
      org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$REVISION \
      org.opencontainers.image.created=$CREATED
