"""Continue a run exactly: random states, a validation that was due, the schedule.

MMEngine itself restores the weights, the optimizer, its schedules and the position in
the data.
"""

import bisect
import random
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from ..checkpoint import CheckpointError
from ..utils.text import shorten

# ---------------------------------------------------------------- random states


def capture() -> dict[str, Any]:
    """Return the random states of Python, numpy, torch and this process's GPU.

    They are plain values and tensors, which safe loading accepts.
    """
    numpy: Any = np.random.get_state(legacy=False)
    return dict(
        python=random.getstate(),
        numpy=(
            numpy['bit_generator'],
            numpy['state']['key'].tolist(),
            int(numpy['state']['pos']),
            int(numpy['has_gauss']),
            float(numpy['gauss']),
        ),
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    )


def restore(state: dict[str, Any]) -> None:
    """Restore the random states that :func:`capture` returned.

    Raises:
        CheckpointError: If ``state`` has another form.
    """
    try:
        name, keys, *rest = state['numpy']
        random.setstate(state['python'])
        np.random.set_state((name, np.array(keys, np.uint32), *rest))
        torch.set_rng_state(state['torch'].cpu())
        if state['cuda'] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state['cuda'].cpu())
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f'the random states in the checkpoint cannot be used: {error!r}. Was it '
            'written by AtomicCheckpointHook? Remove `resume_state` from the file to '
            'continue with other random numbers.'
        ) from error


# ---------------------------------------------------- position of the run


def continue_exactly(runner: Runner, state: dict[str, Any]) -> None:
    """Restore the state of a resumed run, at the end of ``before_train``.

    A validation that follows the checkpoint is repeated, since it may find the best
    checkpoint or change the learning rate, unless the checkpoint was saved after it.

    Args:
        runner (Runner): The resumed runner.
        state (dict): ``random_states`` of all processes, and ``validated``, whether
            the checkpoint was saved after the validation of its iteration.

    Raises:
        CheckpointError: If ``state`` has another form.
    """
    try:
        states, validated = list(state['random_states']), bool(state['validated'])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f'the resume_state in the checkpoint cannot be used: {error!r}. Remove it '
            'from the file to continue with other random numbers.'
        ) from error
    if len(states) == get_world_size():
        own = states[get_rank()]
        restore(own)
        loop = runner.train_loop
        if runner.iter and hasattr(loop, 'dataloader_iterator'):
            # with this option, OneDL's MMEngine does not skip batches
            skip = 0 if getattr(loop, 'fast_forward_on_resume', False) else runner.iter
            loop.dataloader_iterator = _RestoresWhenAdvanced(loop, skip, own)
    else:
        runner.logger.warning(
            f'the checkpoint was saved by {len(states)} processes, and these are '
            f'{get_world_size()}, so that the data are dealt out otherwise and the run '
            'continues with other random numbers.'
        )
    if not validated and _is_validation_skipped(runner):
        runner.logger.info('Validating, as the run would have after its checkpoint.')
        runner.val_loop.run()


def _is_validation_skipped(runner: Runner) -> bool:
    """Whether the checkpoint was saved right before a validation."""
    if runner.message_hub.runtime_info.get('preempted_before_validation'):
        return False  # PreemptionHook does it
    if isinstance(runner.train_loop, EpochBasedTrainLoop):
        if runner.iter > runner.epoch * len(runner.train_dataloader):
            return False  # within an epoch, see PreemptionHook
        return is_validation_due(runner, runner.epoch)
    return is_validation_due(runner, runner.iter)


def is_validation_due(runner: Runner, done: int) -> bool:
    """Whether MMEngine validates after ``done`` iterations or, by epoch, epochs."""
    loop = runner.train_loop
    if runner.val_loop is None or not hasattr(loop, 'dynamic_intervals'):
        return False
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    last = runner.max_epochs if by_epoch else runner.max_iters
    stage = bisect.bisect(loop.dynamic_milestones, done + 1) - 1
    is_turn = done % loop.dynamic_intervals[stage] == 0 or done == last
    return done >= loop.val_begin and is_turn


class _RestoresWhenAdvanced:
    """Stands in for the iterator of a loop until the first new batch.

    In iteration-based training, MMEngine skips the batches of the earlier run after the
    ``before_train`` of all hooks, and draws random numbers while it does so. In
    epoch-based training there is nothing to skip.
    """

    def __init__(self, loop: Any, skip: int, state: dict[str, Any]) -> None:
        self._loop, self._skip, self._state = loop, skip, state
        self._iterator = loop.dataloader_iterator

    def __iter__(self) -> '_RestoresWhenAdvanced':
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)

    def __next__(self) -> Any:
        if self._skip > 0:
            self._skip -= 1
            return next(self._iterator)
        self._loop.dataloader_iterator = self._iterator
        restore(self._state)
        loader = self._loop.dataloader
        is_onedl = hasattr(self._iterator, 'skip_iter')
        if not (is_onedl and isinstance(loader, DataLoader)):
            return next(self._iterator)
        # OneDL's MMEngine starts the data loader only now, which would draw a seed
        generator = loader.generator
        loader.generator = generator or torch.Generator()
        try:
            return next(self._iterator)
        finally:
            loader.generator = generator

    def skip_iter(self, num_iters: int) -> None:
        """Skip several batches at once, as OneDL's MMEngine does."""
        self._skip -= num_iters
        self._iterator.skip_iter(num_iters)


# --------------------------------------------------- learning rates and schedules

# fields of a schedule that are not settings: its position, rates that follow from the
# optimizer's, and an option that only prints
_POSITION = ('last_step', '_global_step', '_last_value', 'base_values', 'verbose')


def choose_schedule(runner: Runner, checkpoint: dict, source: str) -> None:
    """Choose the learning rates and schedules of a resumed run, and report differences.

    MMEngine silently uses those of the checkpoint. If the schedules are of other kinds,
    that ends in an error or in wrong rates. Here, those of the config and all its
    optimizer settings are used if ``source`` is ``'config'``, or if the schedules are
    of other kinds. They are advanced to where they would be if they had been used from
    the start, and the checkpoint is changed in place. It must be called before anything
    is loaded. It does nothing for several optimizers (``OptimWrapperDict``).
    """
    wrapper, schedules = runner.optim_wrapper, runner.param_schedulers or []
    saved = checkpoint.get('optimizer')
    if saved is None or not isinstance(wrapper, OptimWrapper):
        return
    pairs = list(zip(wrapper.param_groups, saved['param_groups']))
    saved_schedules = checkpoint.get('param_schedulers', [])
    fits, changes = _find_changes(pairs, schedules, saved_schedules)
    if not changes:
        return
    text = shorten(changes, 6)
    if source == 'checkpoint' and fits:
        runner.logger.warning(
            'The run continues with the optimizer and schedules of the checkpoint, '
            f'which are not those of the config: {text}. To use those of the config '
            'from here on: --cfg-options default_hooks.checkpoint.schedule_from=config.'
        )
        return
    runner.logger.warning(
        'The run continues with the optimizer and schedules of the config, which are '
        f'not those of the checkpoint: {text}.'
    )
    _advance(runner, schedules, checkpoint['meta']['iter'])
    for own, group in pairs:
        group.update((key, value) for key, value in own.items() if key != 'params')
    checkpoint['param_schedulers'] = [schedule.state_dict() for schedule in schedules]


def _find_changes(
    groups: list[tuple[dict, dict]], schedules: list, saved_schedules: list[dict]
) -> tuple[bool, list[str]]:
    """Whether the kinds of schedules are the same, and which settings differ."""
    changes: dict[str, str] = {}
    for own, saved in groups:
        # of a scheduled value, the initial one is compared
        starts = [key for key in own if key.startswith('initial_')]
        scheduled = [key.replace('initial_', '') for key in starts]
        if 'momentum' in scheduled:
            scheduled.append('betas')  # Adam's momentum
        _compare('', own, saved, ['params', *scheduled], changes)
    states = [schedule.state_dict() for schedule in schedules]
    fits = [state.keys() for state in states] == [s.keys() for s in saved_schedules]
    if fits:
        for schedule, own, saved in zip(schedules, states, saved_schedules):
            _compare(f'{type(schedule).__name__}.', own, saved, _POSITION, changes)
    else:
        kinds = ', '.join(type(schedule).__name__ for schedule in schedules)
        changes['kinds'] = f'schedules of other kinds (config: {kinds or "none"})'
    return fits, list(changes.values())


def _compare(
    owner: str, own: dict, saved: dict, without: Sequence[str], changes: dict[str, str]
) -> None:
    """Add to ``changes`` a text a field: ``'lr 0.001 (config: 0.002)'``."""
    for key, value in own.items():
        if key in saved and key not in without and saved[key] != value:
            name = owner + key.replace('initial_', '')
            text = f'{name} {_plain(saved[key])} (config: {_plain(value)})'
            changes.setdefault(name, text)


def _plain(value: Any) -> str:
    """Show a counter of milestones as a list."""
    return str(sorted(value.elements()) if isinstance(value, Counter) else value)


def _advance(runner: Runner, schedules: list, iterations: int) -> None:
    """Step new schedules to where they are after some iterations."""
    by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
    # those that need the metric of a validation start anew
    steps = [s for s in schedules if not getattr(s, 'need_val_args', False)]
    with warnings.catch_warnings():
        # a warning that the optimizer was not stepped before
        warnings.simplefilter('ignore', UserWarning)
        for done in range(1, iterations + 1):
            for schedule in steps:
                if not schedule.by_epoch or (
                    by_epoch and done % len(runner.train_dataloader) == 0
                ):
                    schedule.step()
