"""Check whether MMEngine will load all of a checkpoint.

MMEngine only unwraps ``state_dict``, and only warns of what does not fit. From a
checkpoint under ``model`` it loads nothing, and the run continues with random weights.
The tools check ``load_from`` and ``resume`` before a run starts. A backbone checks the
weights that it receives from the ``init_cfg`` of an outer module.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.utils import deprecated_api_warning
from torch import Tensor, nn

from ..utils.text import shorten
from .classifier import PublishedClassifierHook
from .comparison import COUNTER, adapt, compare, describe_defects, explain, tensors_of
from .reading import CheckpointError, RefusedError, Source, read_checkpoint
from .resume import Latest, on_first_process
from .state_dict import as_mmengine_reads

# Differences between a detector's backbone and the classifier that it comes from: the
# output norms of ResT and ResTV2, and the final norm, which ResTV2 does not use
NEW_IN_BACKBONE = ('backbone.norm[123]', 'backbone.norm_[1234]')
UNUSED_IN_BACKBONE = ('backbone.norm',)

_BACKBONE_ADVICE = (
    "name it in the config: model.backbone.init_cfg=dict(type='Pretrained', "
    'checkpoint=...). A detector of detectron2 must be converted first, see '
    'tools/model_converters.'
)


@deprecated_api_warning({'may_be_new': 'allow_missing'})
def check_load_from(
    model: nn.Module,
    source: Union[Source, Latest],
    exact: bool = True,
    allow_missing: Sequence[str] = NEW_IN_BACKBONE,
    hooks: Sequence[Hook] = (),
) -> None:
    """Check a checkpoint that MMEngine's Runner is about to load.

    All processes of a distributed run must call it. The first one reads a local file,
    and all raise the same error.

    Args:
        model (nn.Module): The Runner's model, wrapped or not.
        source (str | Path | Latest): The value of ``load_from`` or ``resume``, or the
            result of :func:`choose_checkpoint`, which is not read again.
        exact (bool): True for testing and resuming: all names and shapes must fit.
            False for fine-tuning: heads may differ, which is logged, but ``backbone``
            must fit. Default: True.
        allow_missing (Sequence[str]): What the file may lack of the backbone if
            ``exact`` is False. Default: its output norms.
        hooks (Sequence[Hook]): The Runner's hooks. ``PublishedClassifierHook`` changes
            the checkpoint. Default: ().

    Raises:
        CheckpointError: If the file cannot be read safely, or MMEngine would not load
            all that is needed.
    """
    model = _unwrapped(model)
    target = tensors_of(model)  # of a sharded model only all processes can do this
    latest = source if isinstance(source, Latest) else Latest(source, None, -1)
    path = latest.path

    def check() -> None:
        if latest.state_dict is not None:
            _check_tensors(
                model, target, path, latest.state_dict, defects=latest.defects
            )
            return
        if latest is source and os.path.isdir(path):
            return  # a sharded checkpoint, which MMEngine's strategies read
        try:
            checkpoint = read_checkpoint(path)
        except RefusedError as error:
            if not error.is_for_newer_torch:
                raise
            # the run continues unchecked, as with MMEngine alone
            print_log(f'Not checked: {error}', logger='current', level=logging.WARNING)
            return
        if isinstance(checkpoint, dict):
            for hook in hooks:
                if isinstance(hook, PublishedClassifierHook):
                    hook.after_load_checkpoint(None, checkpoint)
        allowed = None if exact else allow_missing
        _check_content(model, target, path, checkpoint, allowed)

    if '://' in os.fspath(path):
        check()  # downloading involves all processes
    else:
        on_first_process(check)


def check_content(model: nn.Module, checkpoint: Any, source: Source) -> None:
    """Check the content of a checkpoint that MMEngine is about to load.

    Args:
        model (nn.Module): The model. All names and shapes must fit it.
        checkpoint (Any): The result of :func:`read_checkpoint`.
        source (str | Path): The file or URL, for messages.

    Raises:
        CheckpointError: If MMEngine would not load all that is needed.
    """
    model = _unwrapped(model)
    _check_content(model, tensors_of(model), source, checkpoint)


def _unwrapped(model: Any) -> nn.Module:
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def _check_content(
    model: nn.Module,
    target: dict[str, Tensor],
    source: Source,
    checkpoint: Any,
    new_in_backbone: Optional[Sequence[str]] = None,
) -> None:
    tensors = as_mmengine_reads(checkpoint, source)
    wrapper = next((k for k in ('model', 'state_dict_ema') if k in checkpoint), '')
    _check_tensors(model, target, source, tensors, new_in_backbone, wrapper)


def _check_tensors(
    model: nn.Module,
    target: dict[str, Tensor],
    source: Source,
    tensors: dict[str, Tensor],
    new_in_backbone: Optional[Sequence[str]] = None,
    wrapper: str = '',
    defects: Sequence[str] = (),
) -> None:
    tensors = adapt(model, tensors)
    found = compare(tensors, target)
    if not found.fitting:
        reason = (
            f'no name and shape is the same. In the file ({len(tensors)}): '
            f'{shorten(tensors, 4)}. In the model ({len(target)}): '
            f'{shorten((n for n in target if COUNTER not in n), 4)}.'
        )
        if not tensors and wrapper:
            reason = f'the tensors are under {wrapper!r}, and it only reads state_dict.'
        raise CheckpointError(
            f'mmengine would load nothing from {source}: {reason} To start from a '
            f'pretrained backbone, {_BACKBONE_ADVICE}'
        )
    defects = [*defects, *describe_defects(found.fitting)]
    what = type(model).__name__
    if new_in_backbone is not None:
        what = f'the backbone of {what}'
        if found.problems:
            print_log(
                f'{source} fits in part: {len(found.fitting)} tensors of '
                f'{len(target)}. ' + ' '.join(found.problems),
                logger='current',
                level=logging.WARNING,
            )
        found = compare(
            _backbone(tensors), _backbone(target), new_in_backbone, UNUSED_IN_BACKBONE
        )
    if found.problems or defects:
        raise CheckpointError(
            f'{source} does not fit {what}. '
            + ' '.join([*explain(model, tensors), *found.problems, *defects])
            + ' Use the config that the checkpoint was trained with.'
        )


def check_parent_init(
    backbone: nn.Module,
    state_dict: Mapping[str, Any],
    prefix: str,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> None:
    """Check what the ``init_cfg`` of an outer module loads into a backbone.

    For the backbone's ``_load_from_state_dict``. It does nothing unless MMEngine is
    initialising the model, since only then a missing part would keep random weights.
    ``prefix`` is the prefix of the backbone's names, as ``'backbone.'``.

    Raises:
        CheckpointError: If the backbone would not be loaded completely.
    """
    # all parts of a model have this attribute during BaseModule.init_weights
    if not hasattr(backbone, '_params_init_info'):
        return
    tensors = {
        name[len(prefix) :]: value
        for name, value in state_dict.items()
        if name.startswith(prefix) and isinstance(value, Tensor)
    }
    name = type(backbone).__name__
    found = compare(
        adapt(backbone, tensors), tensors_of(backbone), allow_missing, allow_unexpected
    )
    if not found.fitting:
        raise CheckpointError(
            f'the checkpoint that an init_cfg (or pretrained) of the model names holds '
            f'no tensor for its {name}: no name in it begins with '
            f'{prefix or "the name of one of its layers"!r}. If it is an ImageNet file '
            f'or only a backbone, {_BACKBONE_ADVICE}'
        )
    problems = [*found.problems, *describe_defects(found.fitting)]
    if problems:
        problems = [*explain(backbone, tensors), *problems]
        raise CheckpointError(
            f'the checkpoint that an init_cfg (or pretrained) of the model names does '
            f'not fit its {name}. {" ".join(problems)}'
        )


def _backbone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in tensors.items() if k.startswith('backbone.')}
