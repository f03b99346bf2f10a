"""End a training on a scheduler's signal, with a checkpoint of that iteration."""

import os.path as osp
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

from mmengine.dist import all_gather_object, barrier, is_main_process
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner

from ..checkpoint.atomic import write_whole
from .agreement import Agreement
from .loader_signals import shield_loader_workers
from .stop_signals import (
    REQUEUE_STATUS,
    STOP_SIGNALS,
    Preempted,
    StopSignals,
    note_requeue,
)
from .unfinished_epoch import skip_batches_done

# what a checkpoint's message hub says of how the run ended
_VALIDATE = 'preempted_before_validation'
_EXTRA_FILE = 'preemption_checkpoint'


@HOOKS.register_module()
class PreemptionHook(Hook):
    """Write a checkpoint at SIGTERM or SIGUSR1 and end with status 75.

    The iteration is finished; with several processes the next one too, for all must
    stop at the same. A validation is broken off and done again by the resumed run;
    only if the processes have different numbers of validation batches is it
    finished. ``--resume`` continues after exactly that iteration, within an epoch
    too. A second signal, more than ``repeat`` seconds later, ends at once.

    The runner's checkpoint hook writes the file, so its settings hold. One that
    saves by epochs writes an ``iter_N.pth`` here, which is removed after the next
    checkpoint if it removes old ones at all.

    Args:
        signals (tuple[str]): Default: ``('SIGTERM', 'SIGUSR1')``.
        status (int): Exit status. Default: 75, which sysexits.h calls a temporary
            failure: try again.
        repeat (float): Seconds in which further signals count as the first one.
            Default: 5.

    Raises:
        ValueError: If there is no such signal.
        Preempted: A ``SystemExit``, on every process, after the checkpoint.
    """

    # the other hooks have counted, scheduled and saved this iteration
    priority = 'LOWEST'

    def __init__(
        self,
        signals: tuple[str, ...] = STOP_SIGNALS,
        status: int = REQUEUE_STATUS,
        repeat: float = 5.0,
    ) -> None:
        self._signals = StopSignals(tuple(signals), repeat)
        self._status = status
        self._agreement = Agreement()
        self._ask_in_validation = False
        # here, because a loop forks its workers before any hook is called
        shield_loader_workers()

    def before_train(self, runner: Runner) -> None:
        """Listen, and do the validation that was broken off."""
        self._signals.start(type(runner.train_loop).run.__code__)
        hub = runner.message_hub
        if hub.runtime_info.get(_VALIDATE) and runner.val_loop is not None:
            hub.update_info(_VALIDATE, False)
            runner.logger.info('The validation that was broken off is done first.')
            runner.val_loop.run()

    def before_train_epoch(self, runner: Runner) -> None:
        """Go on within an epoch."""
        skip_batches_done(runner)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Optional[dict] = None,
    ) -> None:
        """Stop here if any process was asked to."""
        if not self._agreement.ask(self._signals.received is not None):
            return
        done = runner.iter + 1
        by_iterations = not isinstance(runner.train_loop, EpochBasedTrainLoop)
        validate = by_iterations and _is_validation_due(runner, done)
        if by_iterations and done >= runner.max_iters and not validate:
            return  # it ends by itself
        self._stop(runner, done, validate)

    def after_train_epoch(self, runner: Runner) -> None:
        """Remove a checkpoint within an epoch when there is a later one."""
        path = runner.message_hub.runtime_info.get(_EXTRA_FILE)
        hook = _find(runner, CheckpointHook)
        if not path or hook is None or hook.last_ckpt in (None, path):
            return
        runner.message_hub.update_info(_EXTRA_FILE, None)
        if hook.max_keep_ckpts > 0 and is_main_process():
            if hook.file_backend.isfile(path):
                hook.file_backend.remove(path)

    def before_val_epoch(self, runner: Runner) -> None:
        """See whether the processes can agree while they validate."""
        counts = all_gather_object(len(runner.val_dataloader))
        self._ask_in_validation = len(set(counts)) == 1

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Break the validation off."""
        if not self._signals.is_listening or not self._ask_in_validation:
            return
        if self._agreement.ask(self._signals.received is not None):
            ema = _find(runner, EMAHook)
            if ema is not None:
                ema.after_val_epoch(runner)  # gives back the trained parameters
            self._stop(runner, runner.iter, validate=True)

    def after_train(self, runner: Runner) -> None:
        """Listen no more."""
        self._agreement.collect()
        self._signals.stop()

    def after_run(self, runner: Runner) -> None:
        """Leave processes that are forked later as they are."""
        shield_loader_workers(False)

    def _stop(self, runner: Runner, done: int, validate: bool) -> None:
        name = self._signals.received or 'a signal to another process'
        runner.logger.info(f'{name}: saving a checkpoint of iteration {done}.')
        runner.message_hub.update_info(_VALIDATE, validate)
        path = _save(runner, done)
        barrier()  # srun and torchrun end the others when the first process leaves
        text = (
            f'Stopped by {name} after iteration {done}, saved as {path}. Continue '
            f'with --resume. Exit status {self._status}.'
        )
        runner.logger.warning(text)
        self._signals.stop()
        note_requeue('saved')
        raise Preempted(text, self._status)


def _find(runner: Runner, kind: type) -> Optional[Hook]:
    return next((hook for hook in runner.hooks if isinstance(hook, kind)), None)


def _is_validation_due(runner: Runner, done: int) -> bool:
    """Whether an iteration-based loop would validate after ``done`` iterations."""
    return (
        runner.val_loop is not None
        and done >= runner.val_begin
        and (done % runner.val_interval == 0 or done == runner.max_iters)
    )


def _save(runner: Runner, done: int) -> str:
    """Save the state after ``done`` iterations; every process must call it."""
    meta = dict(epoch=runner.epoch, iter=done)
    hook = _find(runner, CheckpointHook)
    if hook is None:
        name = f'iter_{done}.pth'
        runner.save_checkpoint(runner.work_dir, name, meta=meta, by_epoch=False)
        path = osp.join(runner.work_dir, name)
        if is_main_process():
            write_whole(osp.join(runner.work_dir, 'last_checkpoint'), path.encode())
        return path
    is_extra = hook.by_epoch
    with _by_iterations(hook):
        path = hook.file_backend.join_path(
            hook.out_dir, hook.filename_tmpl.format(done)
        )
        runner.message_hub.update_info(_EXTRA_FILE, path if is_extra else None)
        hook._save_checkpoint_with_step(runner, done, meta)
    return path


@contextmanager
def _by_iterations(hook: CheckpointHook) -> Iterator[None]:
    """Let a checkpoint hook that saves by epochs save an iteration."""
    before = hook.by_epoch, hook.filename_tmpl, hook.max_keep_ckpts
    if hook.by_epoch:
        # its list of old files is one of epochs
        hook.by_epoch, hook.max_keep_ckpts = False, -1
        hook.filename_tmpl = 'iter_{}.pth'
    try:
        yield
    finally:
        hook.by_epoch, hook.filename_tmpl, hook.max_keep_ckpts = before
