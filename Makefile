# AFD Mesh. `make` alone lists what there is.
SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build of torch; for CUDA: make setup TORCH_INDEX=https://download.pytorch.org/whl/cu130
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
READY := $(VENV)/.ready

# make up TLS=1 GPU=1 PROFILES="observability two-gateways"
COMPOSE := docker compose --file compose.yaml $(if $(TLS),--file compose.tls.yaml) \
	$(if $(GPU),--file compose.gpu.yaml) $(addprefix --profile ,$(PROFILES))
WAIT_S ?= 180
JOBS ?= 2
ifneq ($(filter observability,$(PROFILES)),)
export OTEL_EXPORTER_OTLP_ENDPOINT ?= http://otel-collector:4317
endif
export REVISION := $(shell git rev-parse --short HEAD 2>/dev/null)

.PHONY: help setup demo images up upgrade down e2e test test-slow test-gpu lint format protos docs clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## make .venv with everything in it

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 1; }
	@echo "making $(VENV) (a few minutes the first time) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet --no-deps --retries 0 --timeout 10 --index-url $(TORCH_INDEX) $(TORCH) 2>/dev/null || $(BIN)/pip install --quiet $(TORCH)
	@$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

demo: setup  ## start a mesh, ask step3-nano a few questions, show one decode step
	@$(BIN)/python -m models.demo

images:  ## build the images of the three services
	$(COMPOSE) build

up:  ## the mesh in containers (compose.yaml), and a question to it; TLS=1, GPU=1, PROFILES=observability
	@$(COMPOSE) up --detach --wait --wait-timeout $(WAIT_S) || { $(COMPOSE) logs --no-log-prefix --tail 3; \
		echo "not all came up, in WAIT_S=$(WAIT_S) seconds at most: above is why, or the last words of each"; exit 1; }
	@if [ "$$($(COMPOSE) exec -T gateway printenv AFD_REQUIRE_API_KEY)" = 1 ]; then \
		echo "for a key: docker compose exec gateway afd keys create NAME"; \
	else \
		$(COMPOSE) exec -T gateway afd chat $(if $(TLS),--ca /etc/afd/tls/ca.crt) <<<"What is 12 + 68?"; \
	fi
	@http=http$(if $(TLS),s)://$$($(COMPOSE) port gateway 8000); \
		echo "gRPC on $$($(COMPOSE) port gateway 50051), OpenAI API on $$http/v1, console on $$http/console; make down ends it"
	$(if $(TLS),@echo "its CA: $(COMPOSE) cp certificates:/certs/ca.crt ca.crt")
	$(if $(filter observability,$(PROFILES)),@echo "Grafana on http://$$($(COMPOSE) port grafana 3000) and Jaeger on http://$$($(COMPOSE) port jaeger 16686)")

upgrade:  ## replace its containers one by one by those of newer images, while it serves
	compose/upgrade

down:  ## stop it; what is in its volumes stays
	$(COMPOSE) --profile '*' down --remove-orphans

e2e: setup  ## the mesh in containers, asked, killed, cut off and upgraded (needs Docker)
	$(BIN)/pytest -m e2e tests/e2e

test: setup  ## the whole suite but slow and GPU tests; JOBS=2 files at once
	$(BIN)/pytest --numprocesses $(JOBS) --dist loadfile

test-slow: setup  ## the slow ones
	$(BIN)/pytest -m slow

test-gpu: setup  ## those that need a CUDA device (make setup TORCH_INDEX=... for its torch)
	$(BIN)/pytest -m gpu

lint: setup  ## ruff, mypy --strict, buf, hadolint, the compose file's schema
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint protos
	$(BIN)/hadolint services/*/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec compose*.yaml

format: setup  ## let ruff format and mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: setup  ## make afd/v1 from protos/
	$(BIN)/python -m grpc_tools.protoc --proto_path=protos --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
		--python_out=. --pyi_out=. --grpc_python_out=. --mypy_grpc_out=. protos/afd/v1/*.proto

docs: setup  ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## remove what is made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
