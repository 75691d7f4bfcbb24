#!/usr/bin/env bash
# The whole road, by the public verbs: real text -> teacher -> logit store -> two students -> report.
# `make demo` calls it; further words are overrides for every verb (such as run.root=runs/again).
set -euo pipefail
export PYTHONSAFEPATH=1
export OMP_NUM_THREADS=1
ranks=2
overrides=("$@")
times=()

sparsekd_on() {  # sparsekd_on RANKS VERB [overrides]
  local processes=$1
  shift
  if [ "$processes" = 1 ]; then
    sparsekd "$@"
  else
    torchrun --standalone --nproc-per-node "$processes" --no-python sparsekd "$@"
  fi
}

stage() {  # stage NAME RANKS VERB [overrides]
  local name=$1 begin=$SECONDS
  shift
  printf '\n== %s\n' "$name"
  sparsekd_on "$@" ${overrides[@]+"${overrides[@]}"}
  times+=("$(printf '%5d s  %s' $((SECONDS - begin)) "$name")")
}

stage "prepare: the standard library becomes packed rows" 1 prepare experiment=demo
stage "train the teacher (kd_weight=0)" $ranks train experiment=demo_teacher
stage "export the teacher" 1 export experiment=demo_teacher
stage "capture: the teacher pass" $ranks capture experiment=demo
stage "train the student with KD" $ranks train experiment=demo
stage "train the CE-only baseline" $ranks train experiment=demo objective=ce_only run.name=ce
stage "export the KD student" 1 export experiment=demo
stage "export the baseline" 1 export experiment=demo run.name=ce
stage "evaluate on held-out documents" 1 evaluate experiment=demo
# The report's lines (table, headline, page, next command) come last, after the times; also where it fails.
last=$(mktemp)
trap 'cat "$last"; rm -f "$last"' EXIT
stage "report" 1 report experiment=demo >"$last"

printf '\n== time by stage\n'
printf '%s\n' "${times[@]}"
printf '%5d s  in all\n' $SECONDS
