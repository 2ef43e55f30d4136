# Two commands: `make demo` runs the main job, `make test` passes the tests. Both set up what they need.
BACKEND ?= nomad
DEVICES ?= 20
OUTPUT  ?= table
ROWS    ?=
PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin

# Without what Python has compiled before, each of the tests' many programs pays a second and more for its start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-fast lint bench faults image servers cluster-test vagrant-files vagrant-validate clean

help:
	@echo "make demo [BACKEND=nomad|kubernetes|local] [DEVICES=20] [OUTPUT=table|json]   run the main job"
	@echo "make test         lint, then the whole suite (fast tests first)"
	@echo "make test-fast    the tests that need no server"
	@echo "make lint         format, lint, strict types, layers"
	@echo "make faults [ROWS='1-K5 20']   the fault matrix on real servers (all rows need root, about 40 min)"
	@echo "make image        build and start both images, the control plane's and the agent's (needs root and buildah)"
	@echo "make cluster-test   the smoke test of a running cluster (NOMAD_ADDR, …: docs/cluster.md)"
	@echo "make vagrant-files  what the machines of the Vagrantfile get; vagrant-validate checks it"
	@echo "make bench        every benchmark, as a table and JSON"
	@echo "make servers      find or build the pinned Nomad, Consul, Kubernetes control plane, and what the tests need besides"

# uv installs in a tenth of pip's time; where it can't be had, pip does.
define install
	@echo "setting up: $(1) (about 10 s, up to a minute with pip)" >&2
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv >/dev/null 2>&1 || true
	@$(BIN)/uv pip install -q --python $(BIN)/python -e "$(2)" 2>/dev/null \
		|| $(BIN)/python -m pip install -q --disable-pip-version-check -e "$(2)"
endef

$(BIN)/python:
	@echo "setting up: virtual environment (about 5 s)" >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml | $(BIN)/python
	$(call install,packages,.)
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(call install,packages for development,.[dev])
	@touch $@ $(VENV)/.run

# What each backend's demo and tests stand on.
SERVERS_nomad      := nomad consul
SERVERS_kubernetes := consul etcd kube-apiserver kube-controller-manager kube-scheduler
# What the tests need besides.
SERVERS_tests      := nats-server helm metrics-server nomad-autoscaler prometheus

demo: $(VENV)/.run
ifneq ($(BACKEND),local)
	@$(BIN)/python -m nomad_watchdog.dev.binaries $(SERVERS_$(BACKEND))
endif
	@$(BIN)/nomad-watchdog --backend $(BACKEND) demo --devices $(DEVICES) -o $(OUTPUT)

servers: $(VENV)/.run
	@$(BIN)/python -m nomad_watchdog.dev.binaries $(SERVERS_nomad) $(SERVERS_kubernetes) $(SERVERS_tests)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/interrogate -q --config pyproject.toml tests

test-fast: $(VENV)/.dev
	@echo "fast tests, without a server (about 16 min)" >&2
	$(BIN)/pytest -m "not servers and not long"

test: lint test-fast servers
	@echo "tests on real servers, the long ones last (about 50 min)" >&2
	$(BIN)/pytest -m "servers and not long"
	$(BIN)/pytest -m "long and not image"

bench: $(VENV)/.dev
	@$(BIN)/python -m nomad_watchdog.dev.binaries $(SERVERS_nomad) $(SERVERS_kubernetes) kwok >/dev/null
	$(BIN)/python -m bench

# All rows go into the document; a choice of them is only printed.
faults: $(VENV)/.dev
	@$(BIN)/python -m nomad_watchdog.dev.binaries $(SERVERS_nomad) $(SERVERS_kubernetes) >/dev/null
	$(BIN)/python -m tests.faults $(if $(ROWS),--rows $(ROWS),--write docs/fault-matrix.md)

# Apart from `make test`, as few machines have buildah.
image: $(VENV)/.dev
	$(BIN)/pytest -m image

cluster-test: $(VENV)/.dev
	@$(BIN)/python -m tests.cluster.smoke

# The names and addresses are the Vagrantfile's.
NETWORK := $(or $(WATCHDOG_NETWORK),192.168.56)
vagrant-files: $(VENV)/.dev
	@mkdir -p .vagrant-cluster/bin
	@for name in nomad consul; do \
		cp "$$($(BIN)/python -m nomad_watchdog.dev.binaries $$name)" .vagrant-cluster/bin/$$name || exit 1; done
	@rm -f .vagrant-cluster/*.whl
	@$(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps -w .vagrant-cluster .
	@bash jobs/cluster/secrets.sh .vagrant-cluster/secrets \
		$(foreach n,1 2 3,server:s$(n)=$(NETWORK).1$(n)) $(foreach n,1 2,client:c$(n)=$(NETWORK).2$(n))
	@echo "ready for: vagrant up" >&2

vagrant-validate:
	@command -v vagrant >/dev/null || { echo "vagrant is not installed (Debian: apt install vagrant)" >&2; exit 1; }
	VAGRANT_CHECKPOINT_DISABLE=1 vagrant validate --ignore-provider

clean:
	rm -rf $(VENV) dist
