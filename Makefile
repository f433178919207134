# `make help` lists the targets. PROFILE, DATASETS and SEED are make variables: make paper DATASETS=charades SEED=7
# A run on some of the data sets, or with another seed, reports below runs/ and does not touch results/PROFILE.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.SUFFIXES:

PROFILE  := mini
# Empty: the data sets and the seed of the profile.
DATASETS :=
SEED     :=
SEEDS    := 42 1 2
PORT     := 8888
# Candidates for making .venv, best first. `make paper PY=/path/to/python` uses an environment of your own as it is.
PYTHON   := python3.11 python3
PY       := .venv/bin/python

export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

comma := ,
VSR1  := $(PY) -m vsr1
ONE   := --profile $(PROFILE) $(if $(SEED),--seed $(SEED))
ALL   := $(ONE) $(if $(DATASETS),--datasets $(subst $(comma), ,$(DATASETS)))

demo: setup  ## show one search on a few rendered videos, turn by turn, with the policy that ships (a minute)
	@$(VSR1) demo

paper: START := $(shell date +%s)
paper: setup  ## regenerate every table and figure of PROFILE into results/PROFILE (set-up included)
	@$(VSR1) paper $(ALL)
	@echo "done in $$(($$(date +%s) - $(START))) s"

test: setup  ## run lint, unit tests, docstring examples, and all notebooks on the smoke profile
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder  # a file stays in one process; long ones first

lab: setup  ## open JupyterLab on the notebooks, for this machine only, with a token (PORT=8888)
	@$(VSR1) lab --port $(PORT)

seeds: setup  ## retrain and evaluate both stages with SEEDS (hours), and add the results to the report
	@$(VSR1) seeds --seeds $(SEEDS) $(ALL)
	@$(VSR1) report $(ALL)

ablations: setup  ## run longer studies beyond the paper (two hours), and add the results to the report
	@$(VSR1) ablations $(ALL)
	@$(VSR1) report $(ALL)

premise: setup  ## measure all baselines without a loop with SEEDS (hours), and add the results to the report
	@$(VSR1) premise --seeds $(SEEDS) $(ALL)
	@$(VSR1) report $(ALL)

exam: setup  ## test claims written in advance on freshly rendered videos, once (15 minutes), and add them to the report
	@$(VSR1) exam $(ALL)
	@$(VSR1) report $(ALL)

archives: setup  ## measure with SEEDS when looking at videos pays off, in a second rendered world (half an hour each), into results/archives
	@$(VSR1) archives --seeds $(SEEDS)

doctor: setup  ## show what this machine can reproduce, and what is missing
	@$(VSR1) doctor $(ONE)

check: setup  ## compare every measured number with its expected value: ok, close, OFF, MISSING
	@$(VSR1) check $(ALL)

readme: setup  ## refresh the generated parts of README.md and docs/ from results/PROFILE
	@$(VSR1) readme --profile $(PROFILE)

publish: setup  ## copy executed notebooks into results/PROFILE, small enough to commit, then do the same as readme
	@$(VSR1) publish --profile $(PROFILE)

bench: setup  ## measure the speed claims on this machine, into results/bench
	@$(PY) -m benchmarks.speed
	@$(PY) -m benchmarks.index

foundation: setup  ## retrain the mini models that ship with the package
	@$(VSR1) foundation

clean:  ## delete what was computed (runs/) and caches; keep results/, indexes/, revisions.json and .venv
	rm -rf runs *.egg-info .pytest_cache .ruff_cache
	find vsr1 tests -name __pycache__ -prune -exec rm -rf {} +

help:  ## show this list
	@echo "make TARGET [PROFILE=$(PROFILE)] [DATASETS=\"charades didemo\"] [SEED=42]"
	@sed -n 's/^\([a-z]*\):[^#]*  ## \(.*\)/  \1 \2/p' $(MAKEFILE_LIST) | \
	    while read -r target words; do printf '  %-12s %s\n' "$$target" "$$words"; done

setup:
ifeq ($(PY),.venv/bin/python)
	@./setup.sh "$(PYTHON)"
endif

.PHONY: demo paper test lab seeds ablations premise archives exam doctor check readme publish bench foundation clean help setup
