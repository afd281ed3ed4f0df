# Every target spells out the plain commands it stands for; `make -n demo` prints them.
#   make demo    the main job: a real language model, real human ratings; about 10 minutes on 2 cores (also: make smollm2)
#   make scratch the same job with a language model that is trained from scratch
#   make quick   does this machine train as ours did? a tiny PPO from scratch beside five seeds of ours, in two minutes
#   make chat    a chat model learns a task that a program checks: fine-tuning, PPO, right answers before and after
#   make test    all tests but the slow ones, which are make test-slow
#   make docs    the docs as a site with a search, in out/docs/site (EXTRAS=docs)
#   make bench   every speed beside TRL's or transformers', in half an hour: a table and out/bench/report.json (EXTRAS=compare)
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev,plot
OUT ?= out/demo
SEED ?= 1
SCRATCH ?= out/scratch
CHAT ?= out/chat
QUICK ?= out/quick

PY = $(VENV)/bin/python
TORCHRUN = OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --standalone --nproc_per_node=2
TEST = OMP_NUM_THREADS=1 $(PY) -m pytest
READY = $(VENV)/ready-$(EXTRAS)

.PHONY: demo smollm2 scratch quick chat test test-slow test-bits lint docs bench clean

demo: $(READY)
	$(PY) export.py --init=smollm2-135m-instruct --out=$(OUT)/base
	$(PY) -m data.prepare vader --tokenizer=$(OUT)/base --out=$(OUT)/data
	$(TORCHRUN) train_rm.py --init=$(OUT)/base --data=$(OUT)/data --trunk=frozen --sentences=5000 \
	    --depths=9,15 --features=2 --sources=film --seed=$(SEED) --out=$(OUT)/rm
	$(TORCHRUN) train_ppo.py --init=$(OUT)/base --data=$(OUT)/data --reward=$(OUT)/rm --out=$(OUT)/ppo \
	    --sources=film --layout=branch --branch_layers=6 --value_base=reward --batch=32 --epochs=1 --iterations=32 \
	    --lr=2e-4 --kl_coef=0.11 --max_kl=6 --max_kl_window=4 --seed=$(SEED)
	$(PY) evaluate.py --base=$(OUT)/base --data=$(OUT)/data --reward=$(OUT)/rm --tuned=$(OUT)/ppo --out=$(OUT) \
	    --sources=film --prompts=256 --best_of=2 --human_texts=64 --seed=$(SEED)
	$(PY) evaluate.py report --run=$(OUT) --reference=results/demo

smollm2: demo

scratch: $(READY)
	$(PY) -m data.prepare vader --out=$(SCRATCH)/data
	$(TORCHRUN) train_lm.py --data=$(SCRATCH)/data --out=$(SCRATCH)/lm --epochs=2
	$(TORCHRUN) train_rm.py --data=$(SCRATCH)/data --init=$(SCRATCH)/lm --sources=film --out=$(SCRATCH)/rm
	$(TORCHRUN) train_ppo.py --data=$(SCRATCH)/data --init=$(SCRATCH)/lm --reward=$(SCRATCH)/rm --out=$(SCRATCH)/ppo --critic=separate \
	    --sources=film
	$(PY) evaluate.py --data=$(SCRATCH)/data --base=$(SCRATCH)/lm --reward=$(SCRATCH)/rm --tuned=$(SCRATCH)/ppo --out=$(SCRATCH) \
	    --sources=film

quick: $(READY)
	$(PY) -m data.prepare vader --out=$(QUICK)/data
	$(TORCHRUN) train_lm.py --data=$(QUICK)/data --out=$(QUICK)/lm --epochs=0.2 --precision=fp32
	$(TORCHRUN) train_rm.py --data=$(QUICK)/data --init=$(QUICK)/lm --out=$(QUICK)/rm --epochs=0.2 --precision=fp32
	$(TORCHRUN) train_ppo.py --data=$(QUICK)/data --init=$(QUICK)/lm --reward=$(QUICK)/rm --out=$(QUICK)/ppo --iterations=16 \
	    --seed=$(SEED) --precision=fp32
	$(PY) evaluate.py --data=$(QUICK)/data --base=$(QUICK)/lm --reward=$(QUICK)/rm --tuned=$(QUICK)/ppo --out=$(QUICK) \
	    --prompts=128 --best_of=1 --human_texts=32 --seed=$(SEED) --precision=fp32
	$(PY) evaluate.py compare $(QUICK) results/quick

chat: $(READY)
	$(PY) export.py --init=smollm2-135m-instruct --out=$(CHAT)/base
	$(PY) -m data.prepare sorting --tokenizer=$(CHAT)/base --out=$(CHAT)/data
	$(TORCHRUN) train_lm.py --init=$(CHAT)/base --data=$(CHAT)/data --out=$(CHAT)/sft --batch=16 --epochs=0.0875 --lr=1e-4 --warmup=2
	$(TORCHRUN) train_ppo.py --init=$(CHAT)/sft --data=$(CHAT)/data --reward=rewards/verify.py:exact --out=$(CHAT)/ppo \
	    --layout=branch --branch_layers=8 --response_tokens=12 --kl_coef=0.01 --lam=1 \
	    --lr=2e-4 --warmup=3 --epochs=1 --iterations=40
	$(PY) evaluate.py --base=$(CHAT)/base --tuned=$(CHAT)/sft,$(CHAT)/ppo --data=$(CHAT)/data --reward=rewards/verify.py:exact \
	    --out=$(CHAT) --response_tokens=12 --prompts=128 --samples=4 --greedy=true --best_of=1

test: $(READY)
	$(TEST) -m "not slow"

test-slow: $(READY)
	$(TEST) -m slow

test-bits: $(READY)  # what is promised to the bit; with ATEN_CPU_CAPABILITY=avx2 as a smaller CPU does it
	$(TEST) -m "bits and not slow"

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

docs: $(READY)
	$(PY) docs/build.py

bench: $(READY)  # half an hour; nothing else should run
	$(PY) bench/all.py

clean:
	rm -rf out build *.egg-info .pytest_cache .ruff_cache .hypothesis

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	touch $@
