"""Continue a run exactly: random states, and a validation that was due.

What MMEngine restores itself, the weights, the optimizer and its schedules, and the
position in the data, is left to it.
"""

import bisect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.runner import Runner

from mmrest.checkpoint import CheckpointError

from . import random_states


def continue_exactly(runner: Runner, state: dict[str, Any]) -> None:
    """Bring a resumed run to where the one that saved the checkpoint was.

    A validation that follows the checkpoint is made again, unless the checkpoint was
    saved after it: it may find the best checkpoint or change the learning rate.

    Args:
        runner (Runner): At the end of ``before_train``, resumed.
        state (dict): ``random_states`` of all processes, and ``validated``, whether
            the checkpoint was saved after the validation of its iteration.

    Raises:
        CheckpointError: If ``state`` is something else.
    """
    try:
        states, validated = list(state['random_states']), bool(state['validated'])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f'the resume_state in the checkpoint cannot be used: {error!r}. Remove it '
            'from the file to continue with other random numbers.'
        ) from error
    try:
        own = random_states.own(states)
    except LookupError as reason:
        runner.logger.warning(
            f'{reason}, so that the data are dealt out otherwise and the run continues '
            'with other random numbers.'
        )
    else:
        random_states.restore(own)
        _call_when_advanced(runner, lambda: random_states.restore(own))
    if not validated and _validation_is_due(runner):
        runner.logger.info('Validating, as the run would have after its checkpoint.')
        runner.val_loop.run()


def _validation_is_due(runner: Runner) -> bool:
    """Whether MMEngine's loops validate after the iteration or epoch of now."""
    loop = runner.train_loop
    if runner.val_loop is None or not hasattr(loop, 'dynamic_intervals'):
        return False
    if runner.message_hub.runtime_info.get('preempted_before_validation'):
        return False  # PreemptionHook sees to it
    done, last = (runner.iter, runner.max_iters)
    if not hasattr(loop, 'dataloader_iterator'):
        done, last = (runner.epoch, runner.max_epochs)
        if runner.iter > done * len(runner.train_dataloader):
            return False  # within an epoch, see PreemptionHook
    stage = bisect.bisect(loop.dynamic_milestones, done + 1) - 1
    is_turn = done % loop.dynamic_intervals[stage] == 0 or done == last
    return done >= loop.val_begin and is_turn


def _call_when_advanced(runner: Runner, action: Callable[[], None]) -> None:
    """Call ``action`` right before the first batch that is new.

    In iteration-based training MMEngine skips the batches that were trained on
    already after all hooks of the start, and draws random numbers while it does so.
    In epoch-based training there is nothing to skip.
    """
    loop = runner.train_loop
    if runner.iter and hasattr(loop, 'dataloader_iterator'):
        # an option of OneDL's MMEngine, not to skip
        skip = 0 if getattr(loop, 'fast_forward_on_resume', False) else runner.iter
        loop.dataloader_iterator = _CallsWhenAdvanced(loop, skip, action)


class _CallsWhenAdvanced:
    """Stands in for a loop's iterator while old batches are skipped."""

    def __init__(self, loop: Any, skip: int, action: Callable[[], None]) -> None:
        self._loop, self._skip, self._action = loop, skip, action
        self._iterator = loop.dataloader_iterator

    def __iter__(self) -> '_CallsWhenAdvanced':
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)

    def __next__(self) -> Any:
        if self._skip > 0:
            self._skip -= 1
            return next(self._iterator)
        self._loop.dataloader_iterator = self._iterator
        self._action()
        if not hasattr(self._iterator, 'skip_iter'):
            return next(self._iterator)
        # OneDL's MMEngine starts the data loader only now
        with _own_seeds(self._loop.dataloader):
            return next(self._iterator)

    def skip_iter(self, num_iters: int) -> None:
        """Skip several batches at once, as OneDL's MMEngine does."""
        self._skip -= num_iters
        self._iterator.skip_iter(num_iters)


@contextmanager
def _own_seeds(dataloader: Any) -> Iterator[None]:
    """Let a data loader that starts take nothing from the global random state."""
    generator = dataloader.generator
    if generator is None:
        dataloader.generator = torch.Generator()
    try:
        yield
    finally:
        dataloader.generator = generator
