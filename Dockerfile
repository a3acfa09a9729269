# syntax=docker/dockerfile:1.10
# Two images out of one file:   docker build --target cpu .      docker build --target cuda .
# Base images are pinned by tag; pin them by digest where you build (docker buildx imagetools inspect).
ARG PYTHON_IMAGE=python:3.12.8-slim-bookworm

# -- the wheel, out of the source tree, which goes no further ---------------------------------------------------------
FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir -c constraints.txt hatchling
COPY server server
COPY kernels kernels
RUN python -m hatchling build -t wheel -d /wheel

# -- the environments -------------------------------------------------------------------------------------------------
FROM ${PYTHON_IMAGE} AS environment
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1
RUN python -m venv /opt/manyhats
ENV PATH=/opt/manyhats/bin:$PATH
COPY constraints.txt /
# Extras of the wheel: --build-arg EXTRAS=[otel,ray]
ARG EXTRAS=

FROM environment AS environment-cpu
ARG TORCH=2.13.0
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --no-deps --index-url "${TORCH_CPU_INDEX}" "torch==${TORCH}"
COPY --from=wheel /wheel /wheel
RUN pip install --no-cache-dir -c /constraints.txt "$(echo /wheel/*.whl)${EXTRAS}"

FROM environment AS environment-cuda
ARG TORCH=2.13.0
RUN pip install --no-cache-dir -c /constraints.txt "torch==${TORCH}"
COPY --from=wheel /wheel /wheel
RUN pip install --no-cache-dir -c /constraints.txt "$(echo /wheel/*.whl)${EXTRAS}"

# -- what runs --------------------------------------------------------------------------------------------------------
FROM ${PYTHON_IMAGE} AS runtime
# A C compiler goes along (150 MB): the CPU's kernels are compiled for the very processor that runs them (9 s, once a
# volume), since their vector and AMX paths are chosen at compile time, and Triton needs one on a GPU. Without it the
# server runs too, on plain PyTorch, slower, and says so.
# Debian's mirrors keep only the newest of a package, so a pinned version would break the build with the next update.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 manyhats \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/manyhats --shell /usr/sbin/nologin manyhats \
 && install -d -o 10001 -g 10001 /var/lib/manyhats /var/lib/manyhats/models /var/lib/manyhats/bases /adapters
# All that is written lies under /var/lib/manyhats and /tmp: the root file system may be read-only.
ENV PATH=/opt/manyhats/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/lib/manyhats \
    HF_HOME=/var/lib/manyhats/hub \
    TRITON_CACHE_DIR=/var/lib/manyhats/triton \
    MANYHATS_HOME=/var/lib/manyhats \
    MANYHATS_HOST=0.0.0.0 \
    MANYHATS_PORT=8000
VOLUME ["/var/lib/manyhats"]
EXPOSE 8000
STOPSIGNAL SIGTERM
# The first start fetches, converts and quantizes a model; it is no failure while it does.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["manyhats"]
CMD ["serve"]

FROM runtime AS cpu
COPY --from=environment-cpu /opt/manyhats /opt/manyhats
ENV MANYHATS_DEVICE=cpu
USER 10001:10001

FROM runtime AS cuda
COPY --from=environment-cuda /opt/manyhats /opt/manyhats
ENV MANYHATS_DEVICE=cuda NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
