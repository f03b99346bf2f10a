"""Will mmengine's ``load_from`` or ``resume`` do what is meant?

mmengine unwraps ``state_dict`` alone, and what does not fit leads to a warning.
A checkpoint under ``model`` therefore loads nothing, and training or testing
goes on with random weights. The tools call this check before a run starts.
"""

import logging
import re
from collections.abc import Mapping, Sequence

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.utils import deprecated_api_warning
from torch import Tensor, nn

from ..utils.text import shorten
from .classifier import PublishedClassifierHook
from .errors import CheckpointError, RefusedError
from .loading import COUNTER, adapt, compare, describe_defects
from .reading import Source, read_checkpoint
from .safe_globals import mmengine_globals_allowed

# of a detector whose backbone comes from a classifier
NEW_IN_BACKBONE = ('backbone.norm1', 'backbone.norm2', 'backbone.norm3')


@deprecated_api_warning({'may_be_new': 'allow_missing'})
def check_load_from(
    model: nn.Module,
    source: Source,
    exact: bool = True,
    allow_missing: Sequence[str] = NEW_IN_BACKBONE,
    hooks: Sequence[Hook] = (),
) -> None:
    """Check a checkpoint that mmengine's Runner is about to load.

    Args:
        model (nn.Module): The Runner's model, wrapped or not.
        source (str | Path): What ``load_from`` or ``resume`` names.
        exact (bool): True for testing and resuming: names and shapes must be
            those of the model. False for fine-tuning: heads may differ, which
            is logged, but ``backbone`` must fit. Default: True.
        allow_missing (Sequence[str]): What the file may lack of the backbone if
            ``exact`` is False. Default: its norms of stages 1 to 3.
        hooks (Sequence[Hook]): The Runner's hooks, of which
            ``PublishedClassifierHook`` changes what is read. Default: ().

    Raises:
        CheckpointError: If the file cannot be read safely, or mmengine would
            load nothing or less than is meant.
    """
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    try:
        checkpoint = read_checkpoint(source)
    except RefusedError as error:
        # as mmengine does there, the run goes on; it is no worse than without us
        if not mmengine_globals_allowed() and error.name.startswith('mmengine.'):
            print_log(f'Not checked: {error}', logger='current', level=logging.WARNING)
            return
        raise
    for hook in hooks:
        if isinstance(hook, PublishedClassifierHook) and isinstance(checkpoint, dict):
            hook.after_load_checkpoint(None, checkpoint)
    tensors = adapt(model, _as_mmengine_reads(checkpoint, source))
    target = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    fitting, problems = compare(tensors, target)
    if not fitting:
        raise CheckpointError(_nothing_fits(checkpoint, tensors, target, source))
    defects = describe_defects(fitting)
    if not exact:
        if problems:
            print_log(
                f'{source} fits in part: {len(fitting)} tensors of {len(target)}. '
                + ' '.join(problems),
                logger='current',
                level=logging.WARNING,
            )
        _, problems = compare(
            _backbone(tensors), _backbone(target), allow_missing=allow_missing
        )
    if problems or defects:
        what = (
            type(model).__name__ if exact else f'the backbone of {type(model).__name__}'
        )
        raise CheckpointError(
            f'{source} does not fit {what}. '
            + ' '.join([*problems, *defects])
            + ' Use the config that the checkpoint was trained with.'
        )


def _as_mmengine_reads(checkpoint: object, source: Source) -> dict:
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(
            f'{source} holds a {type(checkpoint).__name__}, not a dict of tensors'
        )
    state = checkpoint.get('state_dict', checkpoint)
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f'state_dict in {source} is a {type(state).__name__}, not a dict of tensors'
        )
    return {
        re.sub(r'^module\.', '', str(name)): tensor
        for name, tensor in state.items()
        if isinstance(tensor, Tensor)
    }


def _nothing_fits(
    checkpoint: Mapping, tensors: dict, target: dict, source: Source
) -> str:
    message = f'mmengine would load nothing from {source}: '
    wrapper = next((k for k in ('model', 'state_dict_ema') if k in checkpoint), None)
    if not tensors and wrapper:
        message += f'the tensors are under {wrapper!r}, and it reads state_dict alone.'
    else:
        message += (
            f'no name and shape is the same. In the file ({len(tensors)}): '
            f'{shorten(tensors, 4)}. In the model ({len(target)}): '
            f'{shorten((n for n in target if COUNTER not in n), 4)}.'
        )
    return message + (
        ' To start from a pretrained backbone, name it in the config: '
        "model.backbone.init_cfg=dict(type='Pretrained', checkpoint=...). A "
        'detector of detectron2 must be converted first, see tools/model_converters.'
    )


def _backbone(tensors: dict) -> dict:
    return {k: v for k, v in tensors.items() if k.startswith('backbone.')}
