# syntax=docker/dockerfile:1
# The serving image: the extra `serve` alone, no training code path, no compiler, no shell scripts, an unprivileged user.
# The build of torch is chosen when the image is built; what the default index offers is often a CUDA build of several GB:
#   docker build --build-arg TORCH_PIP_ARGS="--index-url <index of CPU wheels>" -t persyn .

FROM python:3.11-slim AS builder
ARG TORCH=torch==2.13.0
ARG TORCH_PIP_ARGS=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1
WORKDIR /build
RUN python -m venv /opt/persyn
# One layer per rate of change: the lock, torch, the project.
COPY requirements-serve.lock ./
RUN /opt/persyn/bin/python -m pip install --no-deps --require-hashes -r requirements-serve.lock
RUN /opt/persyn/bin/python -m pip install ${TORCH_PIP_ARGS} "${TORCH}"
COPY pyproject.toml README.md LICENSE ./
COPY clients ./clients
COPY router_model ./router_model
COPY service ./service
RUN /opt/persyn/bin/python -m pip install --no-deps --no-build-isolation ".[serve]"

FROM python:3.11-slim AS runtime
LABEL org.opencontainers.image.title="PerSyn" \
      org.opencontainers.image.licenses="Apache-2.0"
# Fixed ids, so that volumes can be given to them. /cache belongs to them before a named volume is laid over it.
RUN groupadd --gid 10001 persyn \
 && useradd --uid 10001 --gid 10001 --home-dir /cache --no-create-home --shell /usr/sbin/nologin persyn \
 && mkdir -p /cache /project \
 && chown 10001:10001 /cache
COPY --from=builder /opt/persyn /opt/persyn
# All that is written lies under /cache and /tmp: the root file system can be read-only.
ENV PATH=/opt/persyn/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/cache \
    HF_HOME=/cache/huggingface \
    PERSYN_CACHE_PATH=/cache/responses.sqlite
WORKDIR /project
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
# Alive, not ready: a container that still warms up must not be restarted. Readiness is /readyz.
HEALTHCHECK --interval=15s --timeout=3s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/livez', timeout=2)"]
ENTRYPOINT ["persyn"]
# Needs PERSYN_API_KEYS: without keys the service refuses to listen beyond loopback.
CMD ["serve", "-c", "/project/persyn.yaml", "--host", "0.0.0.0", "--port", "8080"]
