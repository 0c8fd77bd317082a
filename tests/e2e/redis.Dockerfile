# Stands in for the redis image where no image registry can be reached: the distribution's Redis.
ARG BASE=python:3.11-slim
FROM ${BASE}
RUN apt-get update && apt-get install --yes --no-install-recommends redis-server && rm -rf /var/lib/apt/lists/* \
    && mkdir --parents /data && chown 999:999 /data
WORKDIR /data
