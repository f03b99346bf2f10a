"""dist_train.sh and slurm_train.sh: signals and statuses, with stand-in programs."""

import os
import signal
import subprocess
import time

import pytest

# notes signals, and what the training would note, and ends with $EXIT_WITH
LAUNCHER = """#!/bin/bash
if [ -n "${NOTE:-}" ]; then echo "$NOTE" > "$MMREST_REQUEUE_FILE"; fi
if [ -n "${WAITS:-}" ]; then
    end() { echo "$1" >> got; exit "$EXIT_WITH"; }
    trap 'end TERM' TERM
    trap 'end USR1' USR1
    trap 'end INT' INT
    touch started
    while :; do sleep 0.05; done
fi
echo "$@" > words
exit "$EXIT_WITH"
"""
NOTES = '#!/bin/sh\necho "$@" >> {name}\n{more}\n'
COMMANDS = {
    'dist_train.sh': ['config.py', '2', '--work-dir', 'run'],
    'slurm_train.sh': ['partition', 'job', 'config.py', 'run'],
}


@pytest.fixture
def scripts(repo, tmp_path):
    """Start a script in an own folder."""
    for name in ('srun', 'python'):
        (tmp_path / name).write_text(LAUNCHER)
    (tmp_path / 'scontrol').write_text(NOTES.format(name='scontrol.log', more=''))
    more = 'echo "${STATE:-RUNNING}"'
    (tmp_path / 'squeue').write_text(NOTES.format(name='squeue.log', more=more))
    for name in ('srun', 'python', 'scontrol', 'squeue'):
        (tmp_path / name).chmod(0o755)

    def start(script, *args, **variables):
        kept = {
            key: value
            for key, value in os.environ.items()
            if key not in ('PYTHON', 'PORT') and not key.startswith('SLURM')
        }
        path = f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'
        return subprocess.Popen(
            [str(repo / 'tools' / script), *COMMANDS[script], *args],
            cwd=tmp_path,
            env=kept | dict(PATH=path, EXIT_WITH='0') | variables,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.mark.parametrize('script', COMMANDS)
@pytest.mark.parametrize(
    ('status', 'note', 'expected'),
    [('0', '', 0), ('1', '', 1), ('1', 'saved', 75), ('137', 'saved', 75)]
    # without a signal to the script, torchrun ended the others after a failure
    + [('1', 'start', 1), ('130', '', 130)],
)
def test_statuses(scripts, tmp_path, script, status, note, expected):
    process = scripts(script, EXIT_WITH=status, NOTE=note)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == expected, errors
    assert ('--resume' in errors) is (expected == 75)
    assert not list(tmp_path.glob('run/.requeue*'))


@pytest.mark.parametrize(
    ('script', 'sent', 'handed_on'),
    [
        # torchrun knows SIGTERM alone
        ('dist_train.sh', 'SIGUSR1', 'TERM'),
        ('dist_train.sh', 'SIGTERM', 'TERM'),
        ('dist_train.sh', 'SIGINT', 'INT'),
        ('slurm_train.sh', 'SIGUSR1', 'USR1'),
        ('slurm_train.sh', 'SIGTERM', 'TERM'),
    ],
)
@pytest.mark.parametrize(('note', 'expected'), [('start', 75), ('', 1)])
def test_signals_are_handed_on(
    scripts, tmp_path, script, sent, handed_on, note, expected
):
    process = scripts(script, EXIT_WITH='1', NOTE=note, WAITS='1')
    end = time.monotonic() + 60
    while not (tmp_path / 'started').exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(getattr(signal, sent))
    _, errors = process.communicate(timeout=60)
    assert (tmp_path / 'got').read_text() == f'{handed_on}\n'
    assert process.returncode == expected, errors


@pytest.mark.parametrize(
    ('variables', 'requeued'),
    [
        (dict(SLURM_JOB_ID='17'), True),
        (dict(SLURM_JOB_ID='17', STATE='COMPLETING'), False),  # cancelled
        (dict(), False),  # not in a batch job
    ],
)
def test_slurm_job_is_queued_again(scripts, tmp_path, variables, requeued):
    process = scripts('slurm_train.sh', EXIT_WITH='1', NOTE='saved', **variables)
    process.communicate(timeout=60)
    assert process.returncode == 75
    log = tmp_path / 'scontrol.log'
    assert (log.read_text() == 'requeue 17\n') if requeued else not log.exists()


@pytest.mark.parametrize(
    ('restarts', 'args', 'count'),
    [('0', (), 0), ('1', (), 1), ('2', ('--resume', 'a.pth'), 1)],
)
def test_slurm_job_that_starts_again_resumes(scripts, tmp_path, restarts, args, count):
    scripts('slurm_train.sh', *args, SLURM_RESTART_COUNT=restarts).wait(60)
    words = (tmp_path / 'words').read_text().split()
    assert words.count('--resume') == count
    assert ('a.pth' in words) is bool(args)


def test_second_signal_goes_to_the_processes(scripts, tmp_path):
    """torchrun waits for them after the first, and would leave them at a second."""
    child = (
        "trap 'echo ended > child; exit 143' TERM; touch started; while :; do :; done"
    )
    (tmp_path / 'child.sh').write_text(child)
    launcher = (
        '#!/bin/bash\nsetsid bash child.sh &\n'
        "trap 'touch waits' TERM\nuntil wait $!; [ -e child ]; do :; done\nexit 1\n"
    )
    (tmp_path / 'python').write_text(launcher)
    process = scripts('dist_train.sh')
    end = time.monotonic() + 60
    for event in ('started', 'waits'):
        while not (tmp_path / event).exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert (tmp_path / 'child').read_text() == 'ended\n'
    assert process.returncode == 1
