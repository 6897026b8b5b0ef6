# The image of Raceme: nodes, clients and gateways (docs/deploy.md).  `make image` builds it.
#
#   BASE    Debian with Python 3.11 to 3.13; `make image-base` makes one where no registry is in reach
#   TORCH   cpu, cuda (the general build, several gigabytes), or a requirement of pip
#   EXTRAS  of pyproject.toml: gateway, metrics, otel

ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
ARG BUILD_PACKAGES="gcc libc6-dev libgmp-dev"
ARG TORCH=cpu
# pip's sources: the usual ones where these are empty.  Neither is in the image.
ARG PIP_INDEX_URL=
ARG PIP_EXTRA_INDEX_URL=
ARG PIP_FIND_LINKS=
# Security updates of these packages are wanted, so they have no version here.
# hadolint ignore=DL3008,SC2086
RUN apt-get update \
    && apt-get install -y --no-install-recommends ${BUILD_PACKAGES} \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY requirements requirements
COPY constraints.txt constraints.txt
COPY scripts/image_environment.py scripts/image_environment.py
RUN python3 scripts/image_environment.py packages /opt/raceme --torch "${TORCH}"
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY tensor_codec tensor_codec
COPY routing routing
COPY node node
COPY client client
ARG EXTRAS=gateway,metrics,otel
RUN python3 scripts/image_environment.py raceme /opt/raceme --extras "${EXTRAS}"

FROM ${BASE}
LABEL org.opencontainers.image.title="Raceme" \
      org.opencontainers.image.description="Nodes, clients and gateways of a swarm that runs a language model" \
      org.opencontainers.image.licenses="Apache-2.0"
ARG BUILD_PACKAGES="gcc libc6-dev libgmp-dev"
ARG TORCH=cpu
# Triton compiles kernels for a GPU on the machine that has it.
# hadolint ignore=DL3008,SC2046,SC2086
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates libgmp10 \
        $([ "${TORCH}" != cuda ] || echo ${BUILD_PACKAGES}) \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 raceme \
    && useradd --uid 10001 --gid 10001 --home-dir /data --no-create-home --shell /usr/sbin/nologin raceme \
    && install -d -o raceme -g raceme -m 0750 /data
COPY --from=build /opt/raceme /opt/raceme
COPY deploy/health.py deploy/prepare.py /opt/raceme/deploy/
# PYTHONSAFEPATH: nothing in the working folder is imported.  Everything that is written goes to /data, but for
# the ready file, which a container that starts again must not find.
ENV PATH=/opt/raceme/bin:${PATH} \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/data \
    RACEME_CACHE=/data \
    HF_HOME=/data/hub-files \
    NUMBA_CACHE_DIR=/data/kernels \
    RACEME_LISTEN=/ip4/0.0.0.0/tcp/31330 \
    RACEME_READY_FILE=/tmp/raceme-ready.json
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 31330 8000 9464
STOPSIGNAL SIGTERM
# A node fetches its model and loads its blocks before it is ready.
HEALTHCHECK --interval=30s --timeout=10s --start-period=30m --retries=3 \
    CMD ["python", "/opt/raceme/deploy/health.py"]
ENTRYPOINT ["python", "-m"]
CMD ["node"]
