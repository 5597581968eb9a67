#!/usr/bin/env bash
# Launch a study of random seeds: check what was asked for, show the plan, run it, report it.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/launch_validation.sh [SPEC] [OPTIONS]

  SPEC              YAML of the study (default: experiments/validation.yaml)
  --profile NAME    size of the study, such as tiny, quick or full
  --phase NAME      run up to and including this phase of seeds, such as phase1 or phase2
  --on ENGINE       where jobs run: local (default), ray, slurm or skypilot
  --jobs N          at most N jobs at once
  --retry           first make failed jobs free to start again
  --serve [PORT]    watch it in a browser meanwhile, on this machine only (default port: 8321)
  --no-report       leave the report out
  --dry-run         check everything, show the plan and the commands, start nothing
  -h, --help        this text

Ends with 0 if everything is done, 1 if a job failed, 2 for a wrong option, 130 if it was stopped; the same command goes on.
TEXT
}

die() { echo "launch_validation: $*" >&2; exit 2; }
need() { [[ $# -ge 2 && -n $2 && $2 != --* ]] || die "$1 needs a value (--help lists the options)."; }

cd "$(dirname "${BASH_SOURCE[0]}")/.."
spec=experiments/validation.yaml; size=(); phase=(); engine=(); jobs=(); retry=0; port=; report=1; dry=0; given=0
while [[ $# -gt 0 ]]; do
  case $1 in
    --profile) need "$@"; size=(--profile "$2"); shift 2 ;;
    --phase) need "$@"; phase=(--phase "$2"); shift 2 ;;
    --on) need "$@"; [[ $2 =~ ^(local|ray|slurm|skypilot)$ ]] || die "--on $2 is unknown: local, ray, slurm or skypilot."
          engine=(--on "$2"); shift 2 ;;
    --jobs) need "$@"; [[ $2 =~ ^[1-9][0-9]*$ ]] || die "--jobs $2 must be a whole number of at least 1."; jobs=(--jobs "$2"); shift 2 ;;
    --retry) retry=1; shift ;;
    --serve) port=8321; shift
             if [[ $# -gt 0 && $1 =~ ^[0-9]+$ ]]; then port=$1; shift; fi
             (( port >= 1 && port <= 65535 )) || die "--serve $port is no port: 1 to 65535." ;;
    --no-report) report=0; shift ;;
    --dry-run) dry=1; shift ;;
    -h|--help) usage; exit 0 ;;
    -*) die "$1 is unknown (--help lists the options)." ;;
    *) (( given == 0 )) || die "only one SPEC, but '$1' is a second one."; spec=$1; given=1; shift ;;
  esac
done
[[ -f $spec ]] || die "there is no study at $spec."

vae_nb=${VAE_NB:-}
if [[ -z $vae_nb ]]; then
  if [[ -x .venv/bin/vae-nb ]]; then vae_nb=.venv/bin/vae-nb; else vae_nb=$(command -v vae-nb) || die "vae-nb is not installed: make env."; fi
fi
# ${a[@]+...}: an empty array is no error in older bash
where=(${size[@]+"${size[@]}"} ${phase[@]+"${phase[@]}"})
run=("$vae_nb" study "$spec" run ${where[@]+"${where[@]}"} ${engine[@]+"${engine[@]}"} ${jobs[@]+"${jobs[@]}"})

"$vae_nb" study "$spec" plan ${where[@]+"${where[@]}"}              # refuses a wrong page, profile or phase
if (( dry )); then
  echo; echo "Would run:"
  if (( retry )); then echo "  $vae_nb study $spec retry${where[*]:+ ${where[*]}}"; fi
  if [[ -n $port ]]; then echo "  $vae_nb serve --port $port"; fi
  echo "  ${run[*]}"
  if (( report )); then echo "  $vae_nb study $spec report${where[*]:+ ${where[*]}}"; fi
  exit 0
fi

if (( retry )); then "$vae_nb" study "$spec" retry ${where[@]+"${where[@]}"} || true; fi
if [[ -n $port ]]; then
  "$vae_nb" serve --port "$port" & server=$!
  trap 'kill "$server" 2>/dev/null || true' EXIT
fi
code=0; "${run[@]}" || code=$?
if (( report && code != 130 && code != 2 )); then "$vae_nb" study "$spec" report ${where[@]+"${where[@]}"}; fi
exit "$code"
