"""What must hold of a work folder after a kill, and of the end of a resumed run."""

import pytest
import torch
from mmengine.runner.loops import _InfiniteDataloaderIterator

from mmrest.checkpoint import inspect_latest, read_checkpoint

UNFINISHED = '*.mmrest-unfinished'

# see docs/reliability.md
needs_past_data = pytest.mark.skipif(
    hasattr(_InfiniteDataloaderIterator, 'skip_iter'),
    reason="onedl-mmengine skips the past data without the workers' random numbers",
)


def check_folder(work_dir):
    """At any moment: whole files only, and ``last_checkpoint`` names one of them."""
    for path in work_dir.glob('*.pth'):
        assert read_checkpoint(path)['state_dict']
    pointer = work_dir / 'last_checkpoint'
    if pointer.exists():
        assert inspect_latest(pointer.read_text()).iteration > 0


def same(one, other):
    """Whether two nests of tensors and values agree bit by bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def check_same_state(path, reference):
    """Parameters, optimizer, schedules and random numbers, bit by bit."""
    ours, theirs = read_checkpoint(path), read_checkpoint(reference)
    for key in ('state_dict', 'optimizer', 'param_schedulers', 'resume_state'):
        assert same(ours[key], theirs[key]), key
    return ours
