"""Find the moment at which a resumed run has passed its old data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.runner import Runner


def restore_when_data_is_advanced(runner: Runner, restore: Callable[[], None]) -> None:
    """Call ``restore`` right before the first batch that is new.

    In iteration-based training MMEngine skips the batches that were trained on
    already after all hooks of the start, and draws random numbers while it does so.
    In epoch-based training there is nothing to skip.

    Args:
        runner (Runner): At ``before_train``, resumed.
        restore (callable): Without arguments.
    """
    loop = runner.train_loop
    if runner.iter and hasattr(loop, 'dataloader_iterator'):
        # an option of OneDL's MMEngine, not to skip
        skip = 0 if getattr(loop, 'fast_forward_on_resume', False) else runner.iter
        loop.dataloader_iterator = _CallsWhenAdvanced(loop, skip, restore)
    else:
        restore()


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
