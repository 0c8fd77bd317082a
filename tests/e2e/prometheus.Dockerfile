# Stands in for the Prometheus image where no image registry can be reached: the distribution's.
ARG BASE=python:3.11-slim
FROM ${BASE}
RUN apt-get update && apt-get install --yes --no-install-recommends prometheus && rm -rf /var/lib/apt/lists/* \
    && mkdir --parents /prometheus && chown 65534:65534 /prometheus
WORKDIR /prometheus
ENTRYPOINT ["prometheus"]
