#!/usr/bin/env bash
# Trains on a Cloud TPU slice: makes it or takes the one of that name, copies this folder, installs, runs the same
# command on all hosts, shows their log, and makes the slice again and continues when it was preempted.
#
#   launch/tpu_vm.sh run --name=NAME --zone=ZONE --type=v5litepod-64 [options] -- --config=FILE --workdir=DIR [...]
#   launch/tpu_vm.sh create|copy|install|train|status|delete  (one step of it; the same options)
#
#   --name=NAME        of the slice (and of its queued resource)
#   --zone=ZONE        e.g. us-east5-a
#   --type=TYPE        v4-N, v5p-N (N TensorCores: twice the chips), v5litepod-N, v6e-N (N chips)
#   --project=ID       else gcloud's own
#   --runtime=VERSION  image of the VMs; else the one for JAX on that type
#   --bucket=NAME      a Cloud Storage bucket to mount as runs/ on every host: --workdir=runs/x lies in it; --workdir=gs://... needs none
#   --env=NAME=VALUE   a variable for the training, e.g. TFDS_DATA_DIR=runs/tfds; may be given several times
#   --spot             cheaper, may be preempted at any time
#   --direct           ask for the slice at once instead of queueing for it
#   --attempts=N       give up after N preemptions or lost connections (default 100)
#   --delete           delete the slice when the run has ended, well or not
#   --dry-run          print every command instead of running it
#
# Exit code: that of the training (0 done, 2 a mistake, 3 the loss is not finite; see cover_jax/main.py), or 1.
set -uo pipefail

fail() {
  echo "Error: $*" >&2
  exit 2
}

usage() {
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
}

# Prints a command so that a shell would read it back as it is, and runs it unless this is a dry run.
do_it() {
  printf '+' >&"$trace"
  printf ' %q' "$@" >&"$trace"
  printf '\n' >&"$trace"
  [[ $dry_run ]] || "$@"
}

gcloud_tpu() {
  do_it gcloud compute tpus "$@" --zone="$zone" --quiet ${project:+--project="$project"}
}

# Runs one line of shell on hosts: on_hosts WHICH LINE. WHICH is 'all' or a number.
on_hosts() {
  gcloud_tpu tpu-vm ssh "$name" --worker="$1" --command="$2"
}

quoted() {
  local line
  printf -v line ' %q' "$@"
  echo "${line# }"
}

# READY, PREEMPTED, CREATING, ... or nothing where there is no such slice. A dry run finds none.
state_of_slice() {
  gcloud_tpu tpu-vm describe "$name" --format='value(state)' 2>/dev/null
}

state_of_queue() {
  gcloud_tpu queued-resources describe "$name" --format='value(state.state)' 2>/dev/null
}

# What no later attempt would mend: no login, no project, no such zone. gcloud says which.
check() {
  gcloud_tpu tpu-vm list --limit=1 --format='value(name)' >/dev/null ||
    fail "gcloud cannot list the slices of $zone: log in (gcloud auth login), give --project or another --zone."
}

create() {
  local state options=(--accelerator-type="$type" --runtime-version="$runtime")
  state=$(state_of_slice)
  if [[ $state == READY ]]; then
    echo "Taking the slice $name, which is there."
    return 0
  fi
  if [[ $state && $state != CREATING && $state != STARTING ]]; then
    echo "The slice $name is $state: making it again."
    delete
  fi
  [[ $spot ]] && options+=(--spot)
  if [[ $direct ]]; then
    gcloud_tpu tpu-vm create "$name" --version="$runtime" --accelerator-type="$type" ${spot:+--spot}
    return
  fi
  case $(state_of_queue) in
    FAILED | SUSPENDED | SUSPENDING) delete ;;
    ?*) echo "The queued resource $name is there." && wait_in_queue && return ;;
  esac
  gcloud_tpu queued-resources create "$name" --node-id="$name" "${options[@]}" || return 1
  wait_in_queue
}

wait_in_queue() {
  local state
  while true; do
    state=$(state_of_queue)
    [[ $dry_run || $state == ACTIVE ]] && return 0
    case $state in FAILED | SUSPENDED | SUSPENDING | '')
      echo "The queued resource $name is ${state:-gone}." >&2
      return 1
      ;;
    esac
    echo "The queued resource $name is $state; asking again in $pause s."
    sleep "$pause"
  done
}

# The files that git knows or would add: no builds, no runs, no environments.
pack() {
  git -C "$root" ls-files -z --cached --others --exclude-standard |
    tar -C "$root" --null -T - --ignore-failed-read -czf "$1"
}

copy() {
  local archive code
  archive=$(mktemp -d) || return 1
  do_it pack "$archive/cover_jax.tar.gz" &&
    gcloud_tpu tpu-vm scp "$archive/cover_jax.tar.gz" "$name:" --worker=all &&
    on_hosts all 'mkdir -p cover_jax && tar -xzf cover_jax.tar.gz -C cover_jax'
  code=$?
  rm -rf "$archive"
  return $code
}

# The images come with an older Python; uv brings its own. The versions are those that the tests ran with.
install() {
  on_hosts all 'set -e
cd cover_jax
python3 -m pip install --quiet --user uv
[ -x .venv/bin/python ] || python3 -m uv venv --quiet --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python --constraint constraints/py312.txt --editable ".[tpu,train]"
.venv/bin/python -c "import jax; print(jax.__version__)"' || return 1
  [[ $bucket ]] || return 0
  on_hosts all "set -e
command -v gcsfuse >/dev/null || {
  release=gcsfuse-\$(lsb_release -c -s)
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
  echo \"deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt \$release main\" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -qq update
  sudo apt-get -qq install -y gcsfuse
}
mkdir -p cover_jax/runs
cd cover_jax
mountpoint -q runs || gcsfuse --implicit-dirs $(quoted "$bucket") runs"
}

# Exit code of the training, or 1 where there is none: no connection, or a host is gone.
train() {
  on_hosts all "$(quoted env "${environment[@]}" bash cover_jax/launch/on_host.sh "${arguments[@]}")" && return 0
  local code
  code=$(on_hosts 0 'cat .cover_jax_run/code' 2>/dev/null)
  [[ $code == [23] ]] && return "$code"
  return 1
}

delete() {
  if [[ $direct ]]; then
    gcloud_tpu tpu-vm delete "$name"
  else
    gcloud_tpu queued-resources delete "$name" --force
  fi
}

status() {
  check
  echo "slice: $(state_of_slice)"
  [[ $direct ]] || echo "queued resource: $(state_of_queue)"
}

# Everything again after each preemption: the run continues from its newest checkpoint.
run() {
  local attempt code=1
  check
  for ((attempt = 1; attempt <= attempts; attempt++)); do
    code=1
    create && copy && install && {
      train
      code=$?
    }
    case $code in 0 | 2 | 3) break ;; esac
    echo "Attempt $attempt of $attempts ended early; again in $pause s." >&2
    sleep "$pause"
  done
  [[ $delete_after ]] && delete
  return "$code"
}

command=${1:-}
shift || true
name='' zone='' type='' project='' runtime='' bucket='' spot='' direct='' delete_after='' dry_run='' attempts=100
arguments=() environment=()
while (($#)); do
  case $1 in
    --name=* | --zone=* | --type=* | --project=* | --runtime=* | --bucket=* | --attempts=*)
      key=${1%%=*}
      printf -v "${key#--}" %s "${1#*=}"
      ;;
    --env=*=*) environment+=("${1#--env=}") ;;
    --spot) spot=1 ;;
    --direct) direct=1 ;;
    --delete) delete_after=1 ;;
    --dry-run) dry_run=1 ;;
    --)
      shift
      arguments=("$@")
      break
      ;;
    *) fail "Unknown option '$1': see $0 --help. Arguments of the training come after --." ;;
  esac
  shift
done
pause=${TPU_VM_PAUSE:-30}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Commands go to the terminal also from within $(...).
exec {trace}>&2
[[ $dry_run ]] && exec {trace}>&1

case $command in
  -h | --help | help | '')
    usage
    exit 0
    ;;
  run | create | copy | install | train | status | delete) ;;
  *) fail "Unknown command '$command': expected run, create, copy, install, train, status or delete." ;;
esac
[[ $name =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] ||
  fail "--name is '$name': give 1 to 62 lower-case letters, digits and dashes, a letter first and no dash last."
[[ $zone ]] || fail '--zone is missing, e.g. --zone=us-east5-a.'
[[ $attempts =~ ^[1-9][0-9]*$ ]] || fail "--attempts is '$attempts': give a number of at least 1."
case $command in run | create)
  case $type in
    v4-*) : "${runtime:=tpu-ubuntu2204-base}" ;;
    v5litepod-*) : "${runtime:=v2-alpha-tpuv5-lite}" ;;
    v5p-*) : "${runtime:=v2-alpha-tpuv5}" ;;
    v6e-*) : "${runtime:=v2-alpha-tpuv6e}" ;;
    v5e-*) fail "--type is '$type': gcloud calls it v5litepod-${type#v5e-}." ;;
    *) [[ $type && $runtime ]] || fail "--type is '$type': give v4-N, v5p-N, v5litepod-N or v6e-N, or --runtime, too." ;;
  esac
  ;;
esac
case $command in run | train)
  ((${#arguments[@]})) || fail 'Nothing to run: give -- --config=FILE --workdir=DIR after the options.'
  for argument in "${arguments[@]}"; do
    case $argument in
      --config=*)
        file=${argument#--config=}
        [[ -f $root/${file%%:*} ]] || fail "$argument: there is no file ${file%%:*} in $root."
        ;;
    esac
  done
  ;;
esac
"$command"
