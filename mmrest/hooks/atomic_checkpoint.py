"""Checkpoints that are whole at every moment, and with which a run continues exactly.

MMEngine's ``CheckpointHook`` writes into the file itself and removes the oldest
checkpoint before, so that a process killed meanwhile leaves half a file, and perhaps
no other. The hook here has the same options and writes through
:mod:`mmrest.checkpoint.atomic`. What a resumed run needs beyond MMEngine's own state
is in :mod:`mmrest.hooks.exact_resume`.
"""

import hashlib
import io
import os
import re
import warnings
from pathlib import Path
from typing import Any, Optional

import torch
from mmengine.dist import all_gather_object, is_main_process, master_only
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..checkpoint import read_checkpoint
from ..checkpoint.atomic import atomic_save, atomic_write, remove_unfinished
from . import exact_resume
from .nonfinite import check_before_saving

# where a checkpoint has what MMEngine does not save, see exact_resume.py
RESUME_STATE = 'resume_state'


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """MMEngine's ``CheckpointHook``, safe against a kill at any moment.

    All options of ``CheckpointHook``, and ``schedule_from``. In addition:

    - Checkpoints, best checkpoints, published ones and ``last_checkpoint`` are
      written whole or not at all. ``last_checkpoint`` is written after the file that
      it names, and older checkpoints are removed after that. What a killed process
      was writing is removed when the next training starts in the same folder.
    - A failing write (disk full, read-only) ends the run on all processes, with
      the reason; earlier files are untouched.
    - The random states of all processes are saved and, on resuming, restored right
      before the first new batch. A validation leaves them as they were, and one that
      was due after the checkpoint is made first. With a fixed ``randomness.seed`` and
      as many processes as before, the run then continues bit by bit where the hardware
      computes the same twice; ``docs/reliability.md`` lists the exceptions.
    - Resuming says so if the optimizer or the schedules of the config are not those of
      the checkpoint.

    Only local files are treated so; with a remote ``backend_args`` or the deprecated
    ``file_client_args`` MMEngine's own way is taken, with the random states.

    Args:
        *args: As for ``CheckpointHook``.
        schedule_from (str): Where a resumed run takes the optimizer's settings
            (learning rate, weight decay, ...) and the schedules from:
            ``'checkpoint'``, as MMEngine does, or ``'config'``. Default:
            ``'checkpoint'``.
        **kwargs: As for ``CheckpointHook``.

    Raises:
        CheckpointWriteError: If a file cannot be written.
        ValueError: If ``schedule_from`` is something else.
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
        """Clear up after a killed process, and prepare to continue exactly."""
        super().before_train(runner)
        self._local = self.file_client_args is None and isinstance(
            self.file_backend, LocalBackend
        )
        if self._local:
            self.file_backend = _RemovesLater()
            if is_main_process():
                self._clear_up(runner)
        self._warn_of_accumulation(runner)
        state, self._loaded_state = self._loaded_state, None
        if state is not None and (runner.iter or runner.epoch):  # load_from: neither
            self._go_on_after(runner, state)
            exact_resume.continue_exactly(runner, state)

    def after_train(self, runner: Runner) -> None:
        """Publish, and remove what is out of date."""
        super().after_train(runner)
        if self._local:
            self._remove_outdated()

    def before_val(self, runner: Runner) -> None:
        """Keep the random states of the training."""
        self._before_val = exact_resume.capture()

    def after_val(self, runner: Runner) -> None:
        """Let the training go on as if there had been no validation."""
        if self._before_val is not None:
            exact_resume.restore(self._before_val)
            self._before_val = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add what is needed to continue exactly; a best checkpoint is not for that."""
        if self._saved_state:
            checkpoint[RESUME_STATE] = self._saved_state

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep what is needed until all hooks have started, and choose the schedule."""
        self._loaded_state = checkpoint.get(RESUME_STATE)
        if runner._resume:
            exact_resume.choose_schedule(runner, checkpoint, self._schedule_from)

    def _clear_up(self, runner: Runner) -> None:
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

    def _go_on_after(self, runner: Runner, state: dict) -> None:
        """Find the latest checkpoint, and remove what the process before was to."""
        known = runner.message_hub.runtime_info.get('last_ckpt')
        if not (self._local and known and isinstance(state, dict)):
            return
        path = os.path.join(self.out_dir, os.path.basename(known))
        # a new best checkpoint is noted in the latest, also if that is an old one
        self.last_ckpt = path if os.path.exists(path) else None
        before, _, after = self.filename_tmpl.partition('{}')
        own = rf'(best_[^/\\]*_)?{re.escape(before)}\d+{re.escape(after)}'
        for name in state.get('outdated', ()):
            if re.fullmatch(own, str(name)):  # a forged file could name any
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
        self._note_kept(runner, step)
        path = os.path.join(self.out_dir, self.filename_tmpl.format(step))
        runner.message_hub.update_info('last_ckpt', path)
        # should the process be killed before it removes them, the next one does
        self._saved_state['outdated'] = [
            os.path.basename(outdated) for outdated in self.file_backend.waiting
        ]
        _WritesWhole(runner).save_checkpoint(
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

        def name_it(beside: str) -> None:
            if is_main_process():
                Path(beside).write_text(path)

        atomic_save(os.path.join(runner.work_dir, 'last_checkpoint'), name_it)
        self._remove_outdated()

    def _note_kept(self, runner: Runner, step: int) -> None:
        """Say which checkpoints are to be kept, and which one no longer."""
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
        # the latest checkpoint, which is to name the best one, comes after it
        self._postponed = []
        try:
            super()._save_best_checkpoint(_WritesWhole(runner), metrics)
        finally:
            postponed, self._postponed = self._postponed, None
        for step, meta in postponed:
            self._save_checkpoint_with_step(runner, step, meta)

    @master_only
    def _publish_model(self, runner: Runner, ckpt_path: str) -> None:
        """Save a checkpoint with ``published_keys`` only, named by its digest."""
        if not self._local:
            super()._publish_model(runner, ckpt_path)
            return
        checkpoint = read_checkpoint(ckpt_path)
        removed = [key for key in checkpoint if key not in self.published_keys]
        kept = {key: checkpoint[key] for key in checkpoint if key not in removed}
        buffer = io.BytesIO()
        torch.save(kept, buffer)
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:8]
        path = f'{os.path.splitext(ckpt_path)[0]}-{digest}.pth'
        atomic_write(path, buffer.getvalue())
        runner.logger.info(
            f'{ckpt_path} is published as {path}, without {", ".join(removed)}.'
        )

    def _remove_outdated(self) -> None:
        """Remove what newer files, now whole, have replaced."""
        best = list(getattr(self, 'best_ckpt_path_dict', {}).values())
        best.append(getattr(self, 'best_ckpt_path', None))
        self.file_backend.remove_waiting({self.last_ckpt, *best})


@HOOKS.register_module()
class WholeCheckpointHook(AtomicCheckpointHook):
    """The name that :class:`AtomicCheckpointHook` had before; deprecated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        warnings.warn(
            'WholeCheckpointHook is now called AtomicCheckpointHook',
            DeprecationWarning,
            stacklevel=2,
        )
        super().__init__(*args, **kwargs)


class _RemovesLater(LocalBackend):
    """Local files; what is to be removed is first remembered."""

    def __init__(self) -> None:
        self.waiting: list[str] = []

    def remove(self, filepath: Any) -> None:
        self.waiting.append(os.fspath(filepath))

    rmtree = remove

    def remove_waiting(self, needed: set) -> None:
        """Remove all of them, on the first process, except those in ``needed``."""
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


class _WritesWhole:
    """A Runner of which ``save_checkpoint`` writes a file whole or not at all."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def save_checkpoint(self, out_dir: str, filename: str, **kwargs: Any) -> None:
        def save(beside: str) -> None:
            self._runner.save_checkpoint(out_dir, os.path.basename(beside), **kwargs)

        atomic_save(os.path.join(out_dir, filename), save)
