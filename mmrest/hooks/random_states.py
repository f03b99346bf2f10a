"""The state of the random number generators of every process."""

import random
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size

from mmrest.checkpoint import CheckpointError


def capture() -> dict[str, Any]:
    """The states of Python, numpy, torch and this process's GPU.

    Returns:
        dict: Plain values and tensors, which safe loading reads.
    """
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return dict(
        python=random.getstate(),
        numpy=(name, keys.tolist(), int(position), int(has_gauss), float(gauss)),
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    )


def restore(state: dict[str, Any]) -> None:
    """Continue from a state.

    Args:
        state (dict): What :func:`capture` returned.

    Raises:
        CheckpointError: If it is something else.
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
            'written by WholeCheckpointHook? Remove `resume_state` from the file to '
            'continue with other random numbers.'
        ) from error


def gather(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of all processes, on each; every process must call it.

    Args:
        state (dict): Of this process.

    Returns:
        list[dict]: In the order of ranks.
    """
    return all_gather_object(state)


def own(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The state of this process among those of a run with as many processes.

    Args:
        states (list[dict]): What :func:`gather` returned.

    Raises:
        LookupError: If the run had another number of processes.
    """
    if len(states) != get_world_size():
        raise LookupError(
            f'the checkpoint was saved by {len(states)} processes, and these are '
            f'{get_world_size()}'
        )
    return states[get_rank()]
