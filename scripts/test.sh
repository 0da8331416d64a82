#!/usr/bin/env bash
# Everything that CI does, in the environment that is on PATH. Needs no network, no GPU and no display.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 MPLBACKEND=agg TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore::FutureWarning
step() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

step "style"
ruff check kklip_nb scripts tests
nbdev_clean

step "the notebooks, the package and the README are in step"
nbdev_export
python scripts/make_readme.py --check
python scripts/run_notebooks.py --check
if command -v git >/dev/null && git rev-parse --git-dir >/dev/null 2>&1; then
  changed=$(git status --porcelain nbs kklip_nb README.md)
  if [ -n "$changed" ]; then printf 'run nbdev_clean, nbdev_export, make readme and commit:\n%s\n' "$changed"; exit 1; fi
fi

step "the teacher is installed, so that no teacher cell is skipped"
python -c "from kklip_nb.teacher import packaged_teacher; print(packaged_teacher().name)"

step "notebooks and solutions"
# 06 trains the two runs that later notebooks find in the cache, so the course comes first
test_notebooks() { OMP_NUM_THREADS=1 timeout 1500 nbdev_test --flags teacher --n_workers 2 --timing "$@"; }
test_notebooks --path nbs --file_re '^(start|0[0-6]_|tools|course|results|own_)' --skip_folder_re '^(solutions|evidence|scale)$'
test_notebooks --path nbs --file_re '^(0[789]_|index)' --skip_folder_re '^(solutions|evidence|scale|appendix)$'
for folder in evidence scale solutions; do test_notebooks --path nbs/$folder; done

step "pytest on the installed package"
rm -rf build/site build/run && mkdir -p build/run
python -m pip install --quiet --no-deps --no-build-isolation --target build/site .
rm -rf build/lib build/bdist.*
tests="$PWD/tests" site="$PWD/build/site"
(cd build/run && PYTHONPATH="$site" KKLIP_SITE="$site" python -m pytest "$tests" -c "$tests/../pyproject.toml" --rootdir "$tests" -p no:cacheprovider -q -n 2 --dist loadfile)
step "done"
