#!/usr/bin/env bash
# Runs on every host of a TPU slice: starts the training unless it is running, shows its log, and exits with its code.
#   bash launch/on_host.sh ARGUMENTS OF cover_jax.main...
# The training is not a child of the connection: when that breaks, calling this again shows the rest of the log.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
state=${COVER_JAX_RUN:-$HOME/.cover_jax_run}
python=${COVER_JAX_PYTHON:-.venv/bin/python}
pause=${COVER_JAX_PAUSE:-10}     # seconds
lasting=${COVER_JAX_LASTING:-3600} # seconds after which a failure is the first of its kind again
mkdir -p "$state"

if [[ ${1:-} == --loop ]]; then
  shift
  # Done, stopped by hand (130), or a mistake that would only be made again: end. Preempted (75): again. Anything else (killed, out of memory,
  # another host died, an unexpected error) may be over the next time: again, each time after a longer pause, and five
  # times at most unless it ran for an hour in between.
  failures=0
  while true; do
    began=$SECONDS
    "$python" -m cover_jax.main "$@"
    code=$?
    wait=$pause
    case $code in
      0 | 2 | 3 | 130) break ;;
      75) failures=0 ;;
      *)
        ((SECONDS - began >= lasting)) && failures=0
        if ((++failures > 5)); then
          echo "cover_jax.main ended with code $code, $failures times in a row: giving up."
          break
        fi
        wait=$((pause * 2 ** (failures - 1)))
        ;;
    esac
    echo "cover_jax.main ended with code $code: starting it again in $wait s."
    sleep "$wait"
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
