# Every target spells out the plain commands it stands for; `make -n demo` prints them.
#   make demo    the main job on real human ratings, 10 minutes or less on 2 cores
#   make test    all tests but the slow ones, which are make test-slow
#   make bench   our sampler beside transformers' (with EXTRAS=compare)
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
OUT ?= out/demo

PY = $(VENV)/bin/python
TORCHRUN = OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --standalone --nproc_per_node=2
READY = $(VENV)/ready-$(EXTRAS)

.PHONY: demo test test-slow lint bench clean

demo: $(READY)
	$(PY) -m data.prepare vader --out=$(OUT)/data
	$(TORCHRUN) train_lm.py --data=$(OUT)/data --out=$(OUT)/lm
	$(TORCHRUN) train_rm.py --data=$(OUT)/data --init=$(OUT)/lm --out=$(OUT)/rm
	$(TORCHRUN) train_ppo.py --data=$(OUT)/data --init=$(OUT)/lm --reward=$(OUT)/rm --out=$(OUT)/ppo --critic=separate
	$(PY) evaluate.py --data=$(OUT)/data --base=$(OUT)/lm --reward=$(OUT)/rm --tuned=$(OUT)/ppo --out=$(OUT)

test: $(READY)
	$(PY) -m pytest -m "not slow"

test-slow: $(READY)
	$(PY) -m pytest -m slow

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: $(READY)
	$(PY) bench/sampler.py --shape=small
	$(PY) bench/sampler.py --shape=smollm2 --rounds=3

clean:
	rm -rf out build *.egg-info .pytest_cache .ruff_cache .hypothesis

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	touch $@
