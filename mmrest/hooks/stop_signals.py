"""Signals with which a scheduler asks a process to end, and the answer to it."""

import os
import signal
import threading
import time
from types import CodeType, FrameType
from typing import Any, Optional

from mmengine.logging import print_log

# EX_TEMPFAIL of sysexits.h: nothing is wrong, try again later
REQUEUE_STATUS = 75
# tools/dist_train.sh and slurm_train.sh name a file here, for torchrun and srun
# hand on no status
REQUEUE_FILE = 'MMREST_REQUEUE_FILE'
STOP_SIGNALS = ('SIGTERM', 'SIGUSR1')


class Preempted(SystemExit):
    """The process ends on request and asks to be started again.

    Uncaught, it ends Python with ``status`` and without a traceback.

    Args:
        reason (str): What happened, for a log.
        status (int): Exit status. Defaults to 75 (``EX_TEMPFAIL``).
    """

    def __init__(self, reason: str, status: int = REQUEUE_STATUS) -> None:
        super().__init__(status)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class StopSignals:
    """Notes signals instead of dying of them.

    Before :meth:`start` is told of a running function, there is nothing to save,
    and a signal raises :class:`Preempted` at once. While that function runs,
    ``received`` holds the first signal's name and it is for the function to end.
    When it has been left by an exception, or at a second signal, the process ends
    as if nobody listened.

    Processes that are forked meanwhile ignore the signals they inherit the
    handlers of.

    Args:
        names (tuple[str]): Signals. Default: ``SIGTERM`` and ``SIGUSR1``.
        repeat (float): Seconds in which further signals count as the first one,
            for srun and torchrun may both hand it on. Default: 5.

    Raises:
        ValueError: If this system knows no such signal.
    """

    def __init__(
        self, names: tuple[str, ...] = STOP_SIGNALS, repeat: float = 5.0
    ) -> None:
        unknown = [name for name in names if not hasattr(signal, name)]
        if unknown:
            raise ValueError(
                f'unknown signals {", ".join(map(str, unknown))}. Give names such as '
                f'{", ".join(STOP_SIGNALS)}.'
            )
        self.received: Optional[str] = None
        self._numbers = [getattr(signal, name) for name in names]
        self._repeat = repeat
        self._since = 0.0
        self._pid = 0
        self._running: Optional[CodeType] = None
        self._before: dict[int, Any] = {}

    def start(self, running: Optional[CodeType] = None) -> None:
        """Take the handlers over; does nothing outside the main thread.

        Args:
            running (code, optional): Code of the function to be ended with care,
                which is running. Default: none, there is nothing to lose.
        """
        if threading.current_thread() is not threading.main_thread():
            print_log(
                'Signals are handled in the main thread alone; preemption will end '
                'this run without a checkpoint.',
                logger='current',
            )
            return
        self._pid, self._running = os.getpid(), running
        for number in self._numbers:
            self._before[number] = signal.signal(number, self._handle)

    @property
    def is_listening(self) -> bool:
        """Whether the handlers are taken over."""
        return bool(self._before)

    def stop(self) -> None:
        """Give the handlers back."""
        for number, handler in self._before.items():
            # None: it was set by something other than Python
            if handler is not None and signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: Optional[FrameType]) -> None:
        if os.getpid() != self._pid:
            return
        name = signal.Signals(number).name
        running = self._running is not None and _is_called(self._running, frame)
        if self._running is None and self.received is None:
            self.received = name
            note_requeue('start')
            reason = f'{name} before the training began'
            # print() may be what was interrupted
            os.write(2, f'{reason}; exit status {REQUEUE_STATUS}.\n'.encode())
            raise Preempted(reason)
        if self.received is None and running:
            self.received, self._since = name, time.monotonic()
        elif not running or time.monotonic() - self._since > self._repeat:
            signal.signal(number, signal.SIG_DFL)
            os.kill(self._pid, number)


def note_requeue(moment: str) -> None:
    """Tell the script that started the processes why they end.

    Args:
        moment (str): ``start`` (before the training began) or ``saved``.
    """
    path = os.environ.get(REQUEUE_FILE)
    if path:
        try:
            with open(path, 'a', encoding='utf-8') as file:
                file.write(f'{moment}\n')
        except OSError as error:
            print_log(f'{path} cannot be written: {error}', logger='current')


def _is_called(code: CodeType, frame: Optional[FrameType]) -> bool:
    """Whether a function is among those that led to ``frame``."""
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False
