# Every target spells out the plain commands it stands for; `make -n demo` prints them.
#   make demo    the main job on real human ratings, 10 minutes or less on 2 cores
#   make smollm2 the same job on a real language model, SmolLM2-135M-Instruct
#   make test    all tests but the slow ones, which are make test-slow
#   make bench   our sampler beside transformers', our PPO beside TRL's (with EXTRAS=compare)
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
OUT ?= out/demo
SMOLLM2 ?= out/smollm2

PY = $(VENV)/bin/python
TORCHRUN = OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --standalone --nproc_per_node=2
READY = $(VENV)/ready-$(EXTRAS)

.PHONY: demo smollm2 test test-slow lint bench clean

demo: $(READY)
	$(PY) -m data.prepare vader --out=$(OUT)/data
	$(TORCHRUN) train_lm.py --data=$(OUT)/data --out=$(OUT)/lm --epochs=2
	$(TORCHRUN) train_rm.py --data=$(OUT)/data --init=$(OUT)/lm --out=$(OUT)/rm
	$(TORCHRUN) train_ppo.py --data=$(OUT)/data --init=$(OUT)/lm --reward=$(OUT)/rm --out=$(OUT)/ppo --critic=separate
	$(PY) evaluate.py --data=$(OUT)/data --base=$(OUT)/lm --reward=$(OUT)/rm --tuned=$(OUT)/ppo --out=$(OUT)

smollm2: $(READY)
	$(PY) export.py --init=smollm2-135m-instruct --out=$(SMOLLM2)/base
	$(PY) -m data.prepare vader --tokenizer=$(SMOLLM2)/base --out=$(SMOLLM2)/data
	$(TORCHRUN) train_rm.py --init=$(SMOLLM2)/base --data=$(SMOLLM2)/data --trunk=frozen --sentences=2000 --out=$(SMOLLM2)/rm
	$(TORCHRUN) train_ppo.py --init=$(SMOLLM2)/base --data=$(SMOLLM2)/data --reward=$(SMOLLM2)/rm --out=$(SMOLLM2)/ppo \
	    --layout=branch --batch=16 --minibatches=2 --iterations=28 --lr=2e-4 --kl_coef=0.05
	$(PY) evaluate.py --base=$(SMOLLM2)/base --data=$(SMOLLM2)/data --reward=$(SMOLLM2)/rm --tuned=$(SMOLLM2)/ppo --out=$(SMOLLM2) \
	    --prompts=128 --best_of=4 --human_texts=128

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
	$(PY) bench/ppo.py --shape=small
	$(PY) bench/ppo.py --shape=smollm2 --rounds=2

clean:
	rm -rf out build *.egg-info .pytest_cache .ruff_cache .hypothesis

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	touch $@
