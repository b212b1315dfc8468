#!/usr/bin/env bash
# Runs on every host of a TPU slice: starts the training unless it is running, shows its log, and exits with its code.
#   bash launch/on_host.sh ARGUMENTS OF cover_jax.main...
# The training is not a child of the connection: when that breaks, calling this again shows the rest of the log.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
state=${COVER_JAX_RUN:-$HOME/.cover_jax_run}
python=${COVER_JAX_PYTHON:-.venv/bin/python}
pause=${COVER_JAX_PAUSE:-10}
mkdir -p "$state"

if [[ ${1:-} == --loop ]]; then
  shift
  # Preempted (75), killed, or another host died: again. Done, or a mistake that would only be made again: end.
  while true; do
    "$python" -m cover_jax.main "$@"
    code=$?
    case $code in 0 | 2 | 3) break ;; esac
    echo "cover_jax.main ended with code $code: starting it again in $pause s."
    sleep "$pause"
  done
  echo "$code" >"$state/code"
  exit "$code"
fi

# The lock is the running loop's; it goes with it, however it ends.
if flock --nonblock "$state/lock" true; then
  rm -f "$state/code"
  : >"$state/log"
  setsid nohup flock --nonblock "$state/lock" bash launch/on_host.sh --loop "$@" >>"$state/log" 2>&1 </dev/null &
  echo $! >"$state/pid"
fi
tail --lines=+1 --follow --pid="$(cat "$state/pid")" "$state/log"
exit "$(cat "$state/code" 2>/dev/null || echo 1)"
