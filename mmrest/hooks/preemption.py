"""End a training on a scheduler's signal, with a checkpoint of that iteration.

The order is: signals, worker processes of data loaders, the rest of an interrupted
epoch, and the hook that uses all three.
"""

import functools
import multiprocessing
import os
import os.path as osp
import select
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Callable, NamedTuple, Optional

import torch
from mmengine.dist import (
    all_gather_object,
    barrier,
    get_comm_device,
    get_world_size,
    is_main_process,
)
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, Runner
from torch.utils.data import DataLoader, IterableDataset

from ..checkpoint.atomic import atomic_write
from ..utils.delayed_flag import DelayedFlag
from . import exact_resume
from .nonfinite import check_before_saving

# EX_TEMPFAIL of sysexits.h
REQUEUE_STATUS = 75
# variable with the path of a file that tools/dist_train.sh and slurm_train.sh read,
# because torchrun and srun do not forward the status
REQUEUE_FILE = 'MMREST_REQUEUE_FILE'
# Windows has no SIGUSR1
STOP_SIGNALS = tuple(s for s in ('SIGTERM', 'SIGUSR1') if hasattr(signal, s))

# entries in the message hub of a checkpoint
_VALIDATE = 'preempted_before_validation'
_EXTRA_FILE = 'preemption_checkpoint'


# ---------------------------------------------------------------------- signals


class Preempted(SystemExit):
    """The process ends on request and asks to be started again.

    If it is not caught, it ends Python with ``status`` (default: 75) and without a
    traceback. ``reason`` is for a log.
    """

    def __init__(self, reason: str, status: int = REQUEUE_STATUS) -> None:
        super().__init__(status)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class StopSignals:
    """Handlers of the signals with which a scheduler ends a job.

    After :meth:`start`, a signal raises :class:`Preempted`, since there is nothing to
    save yet. Within :meth:`noted`, it only sets ``received``, the name of the first
    signal. A second signal ends the process at once, unless it comes within ``repeat``
    seconds, because srun and torchrun may both forward it. SIGTERM ends child processes
    as if there were no handler.

    Raises:
        ValueError: If this system has no such signal.
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
        self._notes = False
        self._before: dict[int, Any] = {}

    @property
    def is_listening(self) -> bool:
        """Whether the handlers are installed."""
        return bool(self._before)

    def start(self) -> None:
        """Install the handlers. This is only possible in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            print_log(
                'Signals are handled in the main thread only; preemption will end '
                'this run without a checkpoint.',
                logger='current',
            )
            return
        self._pid, self.received = os.getpid(), None
        for number in self._numbers:
            self._before[number] = signal.signal(number, self._handle)

    def stop(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._before.items():
            # None: it was set by something other than Python
            if handler is not None and signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        self._before = {}

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Only record signals, and restore the previous handlers afterwards.

        If the block ends with an error, later signals end the process: a job that
        failed must not ask to be started again.
        """
        self._notes = True
        self.start()
        try:
            yield
        except Exception:
            for number, handler in self._before.items():
                if isinstance(getattr(handler, '__self__', None), StopSignals):
                    self._before[number] = signal.SIG_DFL
            raise
        finally:
            self.stop()
            self._notes = False

    def _handle(self, number: int, frame: Optional[FrameType]) -> None:
        if os.getpid() != self._pid:  # a child process that inherited the handler
            if number == signal.SIGTERM:
                _die_of(number)
        elif self.received is not None:
            if time.monotonic() - self._since > self._repeat:
                _die_of(number)
        else:
            self.received = signal.Signals(number).name
            self._since = time.monotonic()
            if not self._notes:
                note_requeue('start')
                reason = f'{self.received} before the training began'
                # not print(), which may have been interrupted
                os.write(2, f'{reason}; exit status {REQUEUE_STATUS}.\n'.encode())
                raise Preempted(reason)


def _die_of(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def note_requeue(moment: str) -> None:
    """Tell the script that started the processes why they end.

    The moment is ``start`` (before the training began) or ``saved``.
    """
    path = os.environ.get(REQUEUE_FILE)
    if not path:
        return
    try:
        with open(path, 'a', encoding='utf-8') as file:
            file.write(f'{moment}\n')
    except OSError as error:
        print_log(f'{path} cannot be written: {error}', logger='current')


# ------------------------------------------------------ workers of data loaders


class WorkerShield:
    """A ``worker_init_fn`` that protects workers from the signals sent to a job.

    Slurm sends SIGTERM to all processes of a job. If a worker ends, torch raises an
    error in the iteration that the main process is about to finish. Until :meth:`end`
    is called, a worker with this function ignores SIGTERM, SIGUSR1 and ``signals``. It
    still ends within seconds if its main process was killed, where torch's own worker
    may wait forever to deliver a batch. ``init`` is the loader's own
    ``worker_init_fn``.

    It works with the start methods fork, spawn and forkserver. On Windows it does
    nothing.
    """

    def __init__(
        self,
        init: Optional[Callable[[int], Any]] = None,
        signals: Iterable[str] = (),
    ) -> None:
        self.init = init
        self.signals = {*STOP_SIGNALS, *signals}
        self._lasts = torch.ones(1, dtype=torch.bool).share_memory_()

    def __call__(self, worker_id: int) -> None:
        if os.name == 'posix':
            for number in (getattr(signal, name) for name in self.signals):
                # A handler, since the thread would not see an ignored signal.
                # Blocking is not enough: threads of libraries do not block signals.
                signal.signal(number, _ignore)
                signal.siginterrupt(number, False)
            receives, sends = os.pipe()
            os.set_blocking(sends, False)
            signal.set_wakeup_fd(sends, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(receives,), daemon=True).start()
        if self.init is not None:
            self.init(worker_id)

    def end(self) -> None:
        """Let the workers end at a signal, also at an earlier one."""
        self._lasts.fill_(False)

    def _watch(self, receives: int) -> None:
        # with forkserver, the system's parent process is the server
        started_by, parent = os.getppid(), multiprocessing.parent_process()
        asked = False
        while os.getppid() == started_by and (parent is None or parent.is_alive()):
            if asked and not self._lasts.item():
                break
            if select.select([receives], [], [], 1.0)[0]:
                asked = asked or signal.SIGTERM in os.read(receives, 1024)
        os._exit(0)  # any other status is an error in the main process


def _ignore(number: int, frame: Optional[FrameType]) -> None:
    """Do nothing."""


@contextmanager
def shield_workers(
    loaders: Iterable[DataLoader], signals: Iterable[str] = ()
) -> Iterator[None]:
    """Shield the workers that data loaders start within this block.

    Their ``worker_init_fn`` is replaced, and restored at the end, also after an error.
    """
    shielded = [
        (loader, WorkerShield(loader.worker_init_fn, signals))
        for loader in loaders
        if _has_workers(loader)
    ]
    try:
        for loader, shield in shielded:
            loader.worker_init_fn = shield
        yield
    finally:
        for loader, shield in shielded:
            loader.worker_init_fn = shield.init
            shield.end()


class _Itself(NamedTuple):
    """Wraps an object so that copying a config does not copy it."""

    value: Any

    def __deepcopy__(self, memo: dict) -> Any:
        return self.value


def _has_workers(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and loader.num_workers > 0


def _renew_loader(runner: Runner, loop: BaseLoop) -> bool:
    """Replace workers that a loop has started before any hook was called.

    MMEngine's ``IterBasedTrainLoop`` starts them when it is built. Its data loader is
    built again, since its sampler was already used, and needs a new iterator.
    """
    iterator: Any = getattr(loop, 'dataloader_iterator', None)
    # (OneDL's MMEngine starts them with the first batch)
    started = getattr(iterator, '_iterator', None) is not None
    if not started or not _has_workers(loop.dataloader):
        return False
    config = runner._train_dataloader
    if isinstance(config, DataLoader):
        runner.logger.warning(
            'The workers of this DataLoader started before PreemptionHook: a SIGTERM '
            'that is sent to them too ends the run with an error. Give the Runner '
            'the config of the data loader, or DataLoader('
            'worker_init_fn=mmrest.hooks.WorkerShield(...)).'
        )
        return False
    iterator._iterator = None
    BaseLoop.__init__(
        loop, runner, dict(config, dataset=_Itself(loop.dataloader.dataset))
    )
    return True


# --------------------------------------------------------- the rest of an epoch


class RestOfBatches:
    """A batch sampler or data loader that skips its first ``done`` batches once.

    It also has the attributes of what it wraps.
    """

    def __init__(self, batches: Any, done: int) -> None:
        self._batches = batches
        self._done = done
        self._state = exact_resume.capture()

    def __iter__(self) -> Iterator:
        batches = iter(self._batches)
        if self._done:
            for _ in range(self._done):
                next(batches, None)
            self._done = 0
            # the numbers at the start of the epoch were drawn before the checkpoint
            exact_resume.restore(self._state)
        yield from batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        return getattr(self.__dict__['_batches'], name)


# --------------------------------------------------------------------- the hook


@HOOKS.register_module()
class PreemptionHook(Hook):
    """Save a checkpoint at SIGTERM or SIGUSR1, and end with status 75.

    The current iteration is finished. With several processes, the next one is finished
    too, because all must stop at the same one. With accumulated gradients, all
    iterations up to the next step are finished, because a checkpoint does not hold
    gradients. A validation is interrupted and repeated by the resumed run, or finished
    if the processes have different numbers of batches. ``--resume`` continues after
    exactly that iteration, also within an epoch.

    The runner's checkpoint hook saves the file, with its settings. If it saves by
    epochs, it saves an ``iter_N.pth`` here. If it removes old files at all, this one is
    removed after the next checkpoint. Signal handlers and the ``worker_init_fn`` of the
    data loaders are replaced only while the training loop runs.

    Args:
        signals (tuple[str]): Default: ``('SIGTERM', 'SIGUSR1')``, or on Windows
            ``('SIGTERM',)``.
        status (int): Exit status. Default: 75, which sysexits.h defines as a temporary
            failure.
        repeat (float): Seconds in which further signals count as the first one. A later
            one ends the process at once. Default: 5.

    Raises:
        ValueError: If there is no such signal.
        Preempted: A ``SystemExit``, on every process, after the checkpoint.
    """

    # after the other hooks have counted, scheduled and saved this iteration
    priority = 'LOWEST'

    def __init__(
        self,
        signals: tuple[str, ...] = STOP_SIGNALS,
        status: int = REQUEUE_STATUS,
        repeat: float = 5.0,
    ) -> None:
        self._names = tuple(signals)
        self._signals = StopSignals(self._names, repeat)
        self._status = status
        self._flag = DelayedFlag()
        self._stops = self._ask_in_validation = False

    def before_run(self, runner: Runner) -> None:
        """Wrap the training loop, to handle signals and workers while it runs."""
        # not runner.train_loop, which would build one for a validation or a test
        loop = runner._train_loop
        if isinstance(loop, BaseLoop):
            # no hook is called after an error, so the loop's run is wrapped
            loop.run = functools.partial(self._run, runner, loop)

    def _run(self, runner: Runner, loop: BaseLoop) -> Any:
        del loop.run
        self._stops, self._flag = False, DelayedFlag()
        state = exact_resume.capture()
        renewed = _renew_loader(runner, loop)
        loops = [loop] if runner.val_loop is None else [loop, runner.val_loop]
        loaders = [loop.dataloader for loop in loops]
        with self._signals.noted(), shield_workers(loaders, self._names):
            if renewed:
                kind = type(loop.dataloader_iterator)
                loop.dataloader_iterator = kind(loop.dataloader)
                # so that a run draws the same random numbers without this hook
                exact_resume.restore(state)
            return loop.run()

    def before_train(self, runner: Runner) -> None:
        """Do the validation that was interrupted."""
        hub = runner.message_hub
        if hub.runtime_info.get(_VALIDATE) and runner.val_loop is not None:
            hub.update_info(_VALIDATE, False)
            runner.logger.info('The interrupted validation is done first.')
            runner.val_loop.run()

    def before_train_epoch(self, runner: Runner) -> None:
        """Start a resumed epoch where its checkpoint was saved.

        MMEngine would repeat the epoch from its first batch, and do more iterations
        than planned. No images are loaded for skipped batches, except by a loader
        without a batch sampler or of an ``IterableDataset``.
        """
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            return
        loader = runner.train_dataloader
        done = runner.iter - runner.epoch * len(loader)
        if 0 < done <= len(loader):
            batches = getattr(loader, 'batch_sampler', None)
            if batches is None or isinstance(loader.dataset, IterableDataset):
                runner.train_loop.dataloader = RestOfBatches(loader, done)
            else:
                # torch forbids the assignment, which existing iterators do not see
                loader.__dict__['batch_sampler'] = RestOfBatches(batches, done)
            runner.logger.info(
                f'{done} of the {len(loader)} batches of epoch {runner.epoch + 1} are '
                'done and skipped.'
            )

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Optional[dict] = None,
    ) -> None:
        """Stop here if any process received a signal."""
        self._stops = self._stops or self._is_agreed()
        if not self._stops or not _is_after_step(runner):
            return
        done = runner.iter + 1
        by_iterations = not isinstance(runner.train_loop, EpochBasedTrainLoop)
        validate = by_iterations and exact_resume.is_validation_due(runner, done)
        if by_iterations and done >= runner.max_iters and not validate:
            return  # the run ends anyway
        self._stop(runner, done, validate)

    def after_train_epoch(self, runner: Runner) -> None:
        """Remove a checkpoint within an epoch once there is a later one."""
        path = runner.message_hub.runtime_info.get(_EXTRA_FILE)
        hook = _find(runner, CheckpointHook)
        if not path or hook is None or hook.last_ckpt in (None, path):
            return
        runner.message_hub.update_info(_EXTRA_FILE, None)
        if hook.max_keep_ckpts > 0 and is_main_process():
            if hook.file_backend.isfile(path):
                hook.file_backend.remove(path)

    def before_val_epoch(self, runner: Runner) -> None:
        """Check whether the processes can communicate in the validation."""
        counts = all_gather_object(len(runner.val_dataloader))
        self._ask_in_validation = len(set(counts)) == 1

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Interrupt the validation."""
        if not self._signals.is_listening or not self._ask_in_validation:
            return
        if self._is_agreed():
            ema = _find(runner, EMAHook)
            if ema is not None:
                ema.after_val_epoch(runner)  # restores the trained parameters
            self._stop(runner, runner.iter, validate=True)

    def after_train(self, runner: Runner) -> None:
        """Read the last flag, so that no communication stays pending."""
        self._flag.receive()

    def _is_agreed(self) -> bool:
        """Whether any process got a signal; with several, before the last call."""
        asked = self._signals.received is not None
        if get_world_size() == 1:
            return asked
        agreed = any(self._flag.receive())
        # filled on the device, since a copy to it would block
        self._flag.send(torch.full((1,), float(asked), device=get_comm_device()))
        return agreed

    def _stop(self, runner: Runner, done: int, validate: bool) -> None:
        name = self._signals.received or 'a signal to another process'
        runner.logger.info(f'{name}: saving a checkpoint of iteration {done}.')
        runner.message_hub.update_info(_VALIDATE, validate)
        path = _save(runner, done)
        barrier()  # srun and torchrun end all processes when the first one ends
        text = (
            f'Stopped by {name} after iteration {done}, saved as {path}. Continue '
            f'with --resume. Exit status {self._status}.'
        )
        if not _is_after_step(runner):  # in a validation between two steps
            text += ' Gradients that were accumulated since the last step are lost.'
        runner.logger.warning(text)
        note_requeue('saved')
        raise Preempted(text, self._status)


def _find(runner: Runner, kind: type) -> Any:
    return next((hook for hook in runner.hooks if isinstance(hook, kind)), None)


def _is_after_step(runner: Runner) -> bool:
    """Whether no gradients are accumulated (``accumulative_counts``)."""
    return getattr(runner.optim_wrapper, 'should_update', lambda: True)()


def _save(runner: Runner, done: int) -> str:
    """Save the state after ``done`` iterations; all processes must call it."""
    check_before_saving(runner)
    meta = dict(epoch=runner.epoch, iter=done)
    hook = _find(runner, CheckpointHook)
    if hook is None:
        name = f'iter_{done}.pth'
        runner.save_checkpoint(runner.work_dir, name, meta=meta, by_epoch=False)
        path = osp.join(runner.work_dir, name)
        if is_main_process():
            last = osp.join(runner.work_dir, 'last_checkpoint')
            atomic_write(last, os.fsencode(path))
        return path
    before = hook.by_epoch, hook.filename_tmpl, hook.max_keep_ckpts
    is_extra = hook.by_epoch
    if is_extra:
        # its list of old files is about epochs
        hook.by_epoch, hook.max_keep_ckpts = False, -1
        hook.filename_tmpl = 'iter_{}.pth'
    try:
        name = hook.filename_tmpl.format(done)
        path = hook.file_backend.join_path(hook.out_dir, name)
        runner.message_hub.update_info(_EXTRA_FILE, path if is_extra else None)
        hook._save_checkpoint_with_step(runner, done, meta)
    finally:
        hook.by_epoch, hook.filename_tmpl, hook.max_keep_ckpts = before
    return path
