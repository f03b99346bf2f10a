"""Checkpoints that are always complete, and with which a run continues exactly.

MMEngine's ``CheckpointHook`` writes into the final file and removes the oldest
checkpoint before. A process that is killed meanwhile leaves half a file, and perhaps no
other one. The hook here has the same options, and writes through
:mod:`mmrest.checkpoint.atomic`. :mod:`mmrest.hooks.exact_resume` handles the state that
MMEngine does not save.
"""

import hashlib
import os
import re
import warnings
from pathlib import Path
from typing import Any, Optional

from mmengine.dist import all_gather_object, is_main_process, master_only
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..checkpoint import read_checkpoint
from ..checkpoint.atomic import (
    atomic_save,
    atomic_write,
    remove_unfinished,
    torch_bytes,
)
from . import exact_resume
from .nonfinite import check_before_saving

# entry of a checkpoint with the state that MMEngine does not save, see exact_resume.py
RESUME_STATE = 'resume_state'


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """MMEngine's ``CheckpointHook``, safe against a kill at any moment.

    It has all options of ``CheckpointHook``, and ``schedule_from``. In addition:

    - Checkpoints, best checkpoints, published ones and ``last_checkpoint`` are written
      completely or not at all. ``last_checkpoint`` is written after the file that it
      names, and older checkpoints are removed after that. Unfinished files of a killed
      process are removed when the next training starts in the same folder.
    - If writing fails (disk full, read-only), the run ends on all processes with the
      reason. Earlier files are intact.
    - The random states of all processes are saved, and restored right before the first
      new batch. A validation does not change them. A validation that was due after the
      checkpoint is done first. With a fixed ``randomness.seed`` and the same number of
      processes, the resumed run is bitwise equal to an uninterrupted one, if the
      hardware is deterministic; ``docs/reliability.md`` lists the exceptions.
    - Resuming warns if the optimizer or the schedules of the config differ from those
      of the checkpoint.

    This applies to local files. With a remote ``backend_args`` or the deprecated
    ``file_client_args``, MMEngine writes the files, with the random states.

    Args:
        *args: As for ``CheckpointHook``.
        schedule_from (str): Where a resumed run takes the settings of the optimizer
            (learning rate, weight decay, ...) and the schedules from: ``'checkpoint'``,
            as MMEngine does, or ``'config'``. Default: ``'checkpoint'``.
        **kwargs: As for ``CheckpointHook``.

    Raises:
        CheckpointWriteError: If a file cannot be written.
        ValueError: If ``schedule_from`` has another value.
    """

    def __init__(
        self, *args: Any, schedule_from: str = 'checkpoint', **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if schedule_from not in ('checkpoint', 'config'):
            raise ValueError(
                "schedule_from of AtomicCheckpointHook must be 'checkpoint' or "
                f"'config', found {schedule_from!r}"
            )
        self._schedule_from = schedule_from
        self.file_backend: Any = None
        self._local = False
        self._saved_state: dict = {}
        self._loaded_state: Optional[dict] = None
        self._before_val: Optional[dict] = None
        self._postponed: Optional[list] = None

    def before_train(self, runner: Runner) -> None:
        """Remove what a killed process left, and prepare to continue exactly."""
        super().before_train(runner)
        self._local = self.file_client_args is None and isinstance(
            self.file_backend, LocalBackend
        )
        if self._local:
            self.file_backend = _DeferredRemovalBackend()
            if is_main_process():
                self._remove_unfinished(runner)
        self._warn_of_accumulation(runner)
        state, self._loaded_state = self._loaded_state, None
        if state is not None and (runner.iter or runner.epoch):  # not with load_from
            self._continue_after(runner, state)
            exact_resume.continue_exactly(runner, state)

    def after_train(self, runner: Runner) -> None:
        """Publish, and remove outdated checkpoints."""
        super().after_train(runner)
        if self._local:
            self._remove_outdated()

    def before_val(self, runner: Runner) -> None:
        """Keep the random states of the training."""
        self._before_val = exact_resume.capture()

    def after_val(self, runner: Runner) -> None:
        """Restore them, as if there had been no validation."""
        if self._before_val is not None:
            exact_resume.restore(self._before_val)
            self._before_val = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the state for exact resuming, except to a best checkpoint."""
        if self._saved_state:
            checkpoint[RESUME_STATE] = self._saved_state

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep this state until all hooks have started, and choose the schedule."""
        self._loaded_state = checkpoint.get(RESUME_STATE)
        if runner._resume:
            exact_resume.choose_schedule(runner, checkpoint, self._schedule_from)

    def _remove_unfinished(self, runner: Runner) -> None:
        for folder in {str(self.out_dir), runner.work_dir}:
            for name in remove_unfinished(folder):
                runner.logger.info(
                    f'Removed {os.path.join(folder, name)}, which a process that was '
                    'killed had begun to write.'
                )

    def _warn_of_accumulation(self, runner: Runner) -> None:
        counts = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
        every = self.interval * (len(runner.train_dataloader) if self.by_epoch else 1)
        if every > 0 and every % counts:
            runner.logger.warning(
                f'A checkpoint every {every} iterations falls between two steps of the '
                f'optimizer (accumulative_counts is {counts}). The gradients that are '
                'accumulated then are not saved, so that a resumed run is not the same '
                'run. Choose default_hooks.checkpoint.interval so that the number of '
                f'iterations is a multiple of {counts}.'
            )

    def _continue_after(self, runner: Runner, state: dict) -> None:
        """Find the latest checkpoint, and finish the removals of the last process."""
        known = runner.message_hub.runtime_info.get('last_ckpt')
        if not (self._local and known and isinstance(state, dict)):
            return
        path = os.path.join(self.out_dir, os.path.basename(known))
        # saving a best checkpoint updates the latest one, even one of an earlier run
        self.last_ckpt = path if os.path.exists(path) else None
        before, _, after = self.filename_tmpl.partition('{}')
        own = rf'(best_[^/\\]*_)?{re.escape(before)}\d+{re.escape(after)}'
        for name in state.get('outdated', ()):
            if re.fullmatch(own, str(name)):  # a forged checkpoint could name any file
                self.file_backend.remove(os.path.join(self.out_dir, name))
        self._remove_outdated()

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        if self._postponed is not None:
            self._postponed.append((step, meta))
            return
        check_before_saving(runner)
        own = self._before_val or exact_resume.capture()
        self._saved_state = dict(
            random_states=all_gather_object(own),
            validated=self._before_val is not None,
        )
        try:
            if self._local:
                self._atomic_save(runner, step, meta)
            else:
                super()._save_checkpoint_with_step(runner, step, meta)
        finally:
            self._saved_state = {}

    def _atomic_save(self, runner: Runner, step: int, meta: dict) -> None:
        self._update_kept(runner, step)
        path = os.path.join(self.out_dir, self.filename_tmpl.format(step))
        runner.message_hub.update_info('last_ckpt', path)
        # if this process is killed before it removes them, the next one does
        self._saved_state['outdated'] = [
            os.path.basename(outdated) for outdated in self.file_backend.waiting
        ]
        _AtomicRunner(runner).save_checkpoint(
            self.out_dir,
            os.path.basename(path),
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        self.last_ckpt = path

        def write_name(temporary: str) -> None:
            if is_main_process():
                Path(temporary).write_bytes(os.fsencode(path))

        atomic_save(os.path.join(runner.work_dir, 'last_checkpoint'), write_name)
        self._remove_outdated()

    def _update_kept(self, runner: Runner, step: int) -> None:
        """Update the list of checkpoints to keep, and mark the outdated ones."""
        if self.max_keep_ckpts <= 0:
            return
        known = list(self.keep_ckpt_ids)
        if known[-1:] != [step]:
            known.append(step)
        for outdated in known[: -self.max_keep_ckpts]:
            name = self.filename_tmpl.format(outdated)
            self.file_backend.remove(os.path.join(self.out_dir, name))
        self.keep_ckpt_ids.clear()
        self.keep_ckpt_ids.extend(known[-self.max_keep_ckpts :])
        runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if not (self.save_best and self._local):
            super()._save_best_checkpoint(runner, metrics)
            return
        # the latest checkpoint, which names the best one, is written after it
        self._postponed = []
        try:
            super()._save_best_checkpoint(_AtomicRunner(runner), metrics)
        finally:
            postponed, self._postponed = self._postponed, None
        for step, meta in postponed:
            self._save_checkpoint_with_step(runner, step, meta)

    @master_only
    def _publish_model(self, runner: Runner, ckpt_path: str) -> None:
        """Save the ``published_keys`` of a checkpoint, in a file named by its hash."""
        if not self._local:
            super()._publish_model(runner, ckpt_path)
            return
        checkpoint = read_checkpoint(ckpt_path)
        removed = [key for key in checkpoint if key not in self.published_keys]
        kept = {key: checkpoint[key] for key in checkpoint if key not in removed}
        content = torch_bytes(kept)
        digest = hashlib.sha256(content).hexdigest()[:8]
        path = f'{os.path.splitext(ckpt_path)[0]}-{digest}.pth'
        atomic_write(path, content)
        runner.logger.info(
            f'{ckpt_path} is published as {path}, without {", ".join(removed)}.'
        )

    def _remove_outdated(self) -> None:
        """Remove files that newer ones, now complete, have replaced."""
        best = list(getattr(self, 'best_ckpt_path_dict', {}).values())
        best.append(getattr(self, 'best_ckpt_path', None))
        self.file_backend.remove_waiting({self.last_ckpt, *best})


@HOOKS.register_module()
class WholeCheckpointHook(AtomicCheckpointHook):
    """Deprecated name of :class:`AtomicCheckpointHook`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        warnings.warn(
            'WholeCheckpointHook is now called AtomicCheckpointHook',
            DeprecationWarning,
            stacklevel=2,
        )
        super().__init__(*args, **kwargs)


class _DeferredRemovalBackend(LocalBackend):
    """Local files, of which removals are postponed."""

    def __init__(self) -> None:
        self.waiting: list[str] = []

    def remove(self, filepath: Any) -> None:
        self.waiting.append(os.fspath(filepath))

    rmtree = remove

    def remove_waiting(self, needed: set) -> None:
        """Remove them, on the first process, except those in ``needed``."""
        waiting, self.waiting = self.waiting, []
        if not is_main_process():
            return
        for path in waiting:
            if path in needed:
                continue
            if os.path.isdir(path):  # a sharded checkpoint
                super().rmtree(path)
            elif os.path.exists(path):
                super().remove(path)


class _AtomicRunner:
    """A Runner whose ``save_checkpoint`` is atomic."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def save_checkpoint(self, out_dir: str, filename: str, **kwargs: Any) -> None:
        def save(temporary: str) -> None:
            name = os.path.basename(temporary)
            self._runner.save_checkpoint(out_dir, name, **kwargs)

        atomic_save(os.path.join(out_dir, filename), save)
