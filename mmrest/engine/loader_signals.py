"""Keeps the worker processes of data loaders alive when a job is asked to end.

Slurm and torchrun send SIGTERM to every process of a job. A worker of torch's
DataLoader that gets it dies, and the main process raises an error in the middle of
the iteration that it was asked to finish.
"""

import os
import signal
import threading

_installed = _active = False


def shield_loader_workers(active: bool = True) -> None:
    """Let processes that are forked from now on take SIGTERM from this one alone.

    Torch's loaders end a worker that hangs in this way, so they still can. SIGUSR1
    such processes take from nobody.

    Args:
        active (bool): False ends this. Default: True.
    """
    global _installed, _active
    _active = active
    if active and not _installed and hasattr(signal, 'sigwaitinfo'):
        os.register_at_fork(after_in_child=_shield)
        _installed = True


def _shield() -> None:
    if not _active:
        return
    # a mask stays when torch sets its own handlers in the worker
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    threading.Thread(target=_wait, name='SIGTERM of the parent', daemon=True).start()


def _wait() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    # as torch's own handler: any other status is an error in the main process
    os._exit(0)
