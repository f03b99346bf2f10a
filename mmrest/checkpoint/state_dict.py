"""Find the tensors of a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmengine.logging import print_log
from torch import Tensor

from ..utils.text import shorten
from .reading import CheckpointError, Source, read_checkpoint

# In order of preference: averaged weights are those that were evaluated. (MMEngine's
# own checkpoints with EMA hold them as `state_dict`.)
WRAPPERS = ('state_dict_ema', 'state_dict', 'model')
# of DistributedDataParallel, torch.compile, detectron2's FPN, and detectors
PREFIXES = ('module.', '_orig_mod.', 'backbone.bottom_up.', 'backbone.')


@dataclass(frozen=True)
class StateDict:
    """The tensors of a checkpoint, and where they were."""

    tensors: dict[str, Tensor]  # under their names in the file
    wrapper: str  # the keys that lead to them, as ``'state_dict'``; empty if bare
    others: dict[str, str]  # entries that are no tensors, with the names of their types


def read_state_dict(source: Source, map_location: Any = 'cpu') -> dict[str, Tensor]:
    """Read the tensors of a checkpoint.

    They may be bare, or under ``state_dict_ema``, ``state_dict`` or ``model``, in this
    order of preference. The prefixes ``module.``, ``_orig_mod.``, ``backbone.`` and
    ``backbone.bottom_up.``, and chains of them, are removed if all names have them. If
    only some have one, as in a detector, the names are kept, and
    :func:`load_pretrained` selects the backbone.

    Args:
        source (str | Path): A file or URL, see :func:`read_checkpoint`.
        map_location (str | torch.device | dict | callable): As in ``torch.load``.
            Default: ``'cpu'``.

    Returns:
        dict[str, Tensor]: The tensors by name.

    Raises:
        CheckpointError: If it cannot be read safely or holds no tensors.
    """
    tensors = find_state_dict(read_checkpoint(source, map_location), source).tensors
    prefix = shared_prefix(tensors)
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items()}


def find_state_dict(checkpoint: Any, source: Source) -> StateDict:
    """Find the state dict in what :func:`read_checkpoint` returned for ``source``.

    Raises:
        CheckpointError: If there are no tensors where they are expected.
    """
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(
            f'{source} holds a {type(checkpoint).__name__}, not a dict of tensors. '
            "Save a model's state_dict()."
        )
    path: list[str] = []
    content = checkpoint
    while found := [name for name in WRAPPERS if _holds_tensors(content.get(name))]:
        if len(found) > 1:
            print_log(
                f'{source} holds {" and ".join(found)}; {found[0]} is read',
                logger='current',
            )
        path.append(found[0])
        content = content[found[0]]
    tensors, others = {}, {}
    for name, value in content.items():
        if isinstance(value, Tensor):
            tensors[str(name)] = value.detach()
        else:
            others[str(name)] = type(value).__name__
    if not tensors:
        raise CheckpointError(_no_tensors(checkpoint, source))
    return StateDict(tensors, '.'.join(path), others)


def as_mmengine_reads(checkpoint: Any, source: Source) -> dict[str, Tensor]:
    """Find the tensors that MMEngine loads: those under ``state_dict``, or bare ones.

    As MMEngine does, it removes the prefix ``module.``.

    Raises:
        CheckpointError: If there is no dict.
    """
    state = checkpoint
    if isinstance(checkpoint, Mapping):
        state = checkpoint.get('state_dict', checkpoint)
    if not isinstance(state, Mapping):
        where = source if state is checkpoint else f'state_dict in {source}'
        raise CheckpointError(
            f'{where} is a {type(state).__name__}, not a dict of tensors'
        )
    return {
        str(name).removeprefix('module.'): tensor
        for name, tensor in state.items()
        if isinstance(tensor, Tensor)
    }


def shared_prefix(names: Any, known: tuple[str, ...] = PREFIXES) -> str:
    """Find the longest chain of known prefixes that all names have."""
    prefix = ''
    while True:
        longer = (prefix + part for part in known)
        fits = [one for one in longer if all(name.startswith(one) for name in names)]
        if not fits:
            return prefix
        prefix = fits[0]


def prefixes_in(names: Any, known: tuple[str, ...] = PREFIXES) -> list[str]:
    """List all chains of known prefixes that any name has, '' first."""
    chains = ['']
    for chain in chains:  # grows while it is read
        for part in known:
            longer = chain + part
            if longer not in chains and any(n.startswith(longer) for n in names):
                chains.append(longer)
    return chains


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(
        isinstance(inner, Tensor) or (key in WRAPPERS and _holds_tensors(inner))
        for key, inner in value.items()
    )


def _no_tensors(checkpoint: Mapping, source: Source) -> str:
    if not checkpoint:
        return f"{source} holds an empty dict. Save a model's state_dict()."
    found = shorten(f'{k!r} ({type(v).__name__})' for k, v in checkpoint.items())
    advice = "Save a model's state_dict()."
    for name, value in checkpoint.items():
        if isinstance(value, Mapping) and any(
            isinstance(v, Tensor) for v in value.values()
        ):
            advice = (
                f"There are tensors under '{name}'; if these are the weights, save "
                f"them again as {{'state_dict': checkpoint['{name}']}}."
            )
            break
    return (
        f'{source} holds no tensors, neither bare nor under {", ".join(WRAPPERS)}; '
        f'found {found}. {advice}'
    )
