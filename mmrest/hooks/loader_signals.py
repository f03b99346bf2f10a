"""Keeps the worker processes of data loaders alive when a job is asked to end.

Slurm and torchrun send SIGTERM to every process of a job. A worker of torch's
DataLoader that gets it dies, and the main process raises an error in the middle of
the iteration that it was asked to finish. A worker whose main process was killed, on
the other hand, may wait for ever to hand over a batch, and keep its memory.
"""

import os
import signal
import threading

PARENT_CHECK = 3.0  # seconds

_installed = _active = False


def shield_loader_workers(active: bool = True) -> None:
    """Let processes that are forked from now on take SIGTERM from this one alone.

    Torch's loaders end a worker that hangs in this way, so they still can. SIGUSR1
    such processes take from nobody. When their parent is gone they end within seconds.

    Args:
        active (bool): False ends this. Default: True.
    """
    global _installed, _active
    _active = active
    if active and not _installed and hasattr(signal, 'sigtimedwait'):
        os.register_at_fork(after_in_child=_shield)
        _installed = True


def _shield() -> None:
    if not _active:
        return
    # a mask stays when torch sets its own handlers in the worker
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    threading.Thread(
        target=_wait, args=(os.getppid(),), name='SIGTERM of the parent', daemon=True
    ).start()


def _wait(parent: int) -> None:
    while os.getppid() == parent:
        sent = signal.sigtimedwait({signal.SIGTERM}, PARENT_CHECK)
        if sent is not None and sent.si_pid == parent:
            break
    # as torch's own handler: any other status is an error in the main process
    os._exit(0)
