"""The rest of an epoch that was broken off."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor


class RestOfBatches:
    """A batch sampler that leaves out its first batches, the first time.

    Args:
        batch_sampler (Iterable): Lists of indices; its other attributes are here too.
        done (int): How many batches to leave out.
    """

    def __init__(self, batch_sampler: Any, done: int) -> None:
        self._batch_sampler = batch_sampler
        self._done = done

    def __iter__(self) -> Iterator:
        done, self._done = self._done, 0
        if not done:
            return iter(self._batch_sampler)
        # a data loader draws a random number when it starts, and did so before
        return _skip(iter(self._batch_sampler), done, torch.get_rng_state())

    def __len__(self) -> int:
        return len(self._batch_sampler)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        return getattr(self.__dict__['_batch_sampler'], name)


def _skip(batches: Iterator, done: int, state: Tensor) -> Iterator:
    rest = islice(batches, done, None)
    first = next(rest, None)
    torch.set_rng_state(state)
    if first is not None:
        yield first
        yield from rest


def skip_batches_done(runner: Runner) -> int:
    """Begin a resumed epoch where its checkpoint was written.

    MMEngine repeats such an epoch from its first batch, and would make more
    iterations than planned. No image is loaded for the batches that are skipped.
    Augmentations in workers of a data loader start from their seeds once more.

    Args:
        runner (Runner): About to begin an epoch. With a loop that counts iterations
            nothing is done.

    Returns:
        int: How many batches will be skipped.
    """
    if not isinstance(runner.train_loop, EpochBasedTrainLoop):
        return 0
    loader = runner.train_dataloader
    done = runner.iter - runner.epoch * len(loader)
    if not 0 < done <= len(loader):
        return 0
    # torch lets nobody assign it: iterators that exist would not notice
    loader.__dict__['batch_sampler'] = RestOfBatches(loader.batch_sampler, done)
    runner.logger.info(
        f'{done} of the {len(loader)} batches of epoch {runner.epoch + 1} are done '
        'and skipped.'
    )
    return done
