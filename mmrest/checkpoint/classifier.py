"""Published ImageNet checkpoints in MMPretrain's ``ImageClassifier``.

A published file holds one flat model, ``stem.*`` to ``norm.*`` and ``head.*``, bare or
under ``model``. MMPretrain has the backbone under ``backbone.`` and the linear layer as
``head.fc``, and MMEngine only reads ``state_dict``.
"""

from collections.abc import Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor, nn

from .comparison import adapt, compare, describe_defects, explain, tensors_of
from .reading import CheckpointError
from .state_dict import find_state_dict, shared_prefix

HEAD = ('head.weight', 'head.bias')
_PARTS = ('backbone.', 'neck.', 'head.', 'data_preprocessor.')


def to_image_classifier(checkpoint: Any) -> dict[str, Tensor]:
    """Rename the tensors of a published classifier.

    Args:
        checkpoint (Any): The content of a file.

    Returns:
        dict[str, Tensor]: Tensors under the names of ``ImageClassifier``; empty if the
        checkpoint does not have the published form.
    """
    try:
        tensors = find_state_dict(checkpoint, 'the checkpoint').tensors
    except CheckpointError:
        return {}
    prefix = shared_prefix(tensors)
    tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
    if not all(name in tensors for name in (*HEAD, 'norm.weight', 'norm.bias')):
        return {}
    return {
        name.replace('head.', 'head.fc.') if name in HEAD else f'backbone.{name}': value
        for name, value in tensors.items()
    }


def load_published_classifier(
    backbone: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> None:
    """Rename a published classifier that ``ImageClassifier`` is about to load.

    For a backbone's method ``_checkpoint_filter``, which MMPretrain's
    ``ImageClassifier`` calls before loading for ``init_cfg``, ``pretrained`` or
    ``get_model``. The state dict is changed in place. It may be a published file or one
    of ``ImageClassifier``.

    Raises:
        CheckpointError: If nothing would be loaded or the backbone does not fit, where
            MMEngine would warn and keep random weights.
    """
    own = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
    renamed = to_image_classifier(own)
    if renamed:
        for name in own:
            del state_dict[prefix + name]
        state_dict.update({prefix + name: value for name, value in renamed.items()})
        own = renamed
    elif own and not prefix and not any(name.startswith(_PARTS) for name in own):
        raise CheckpointError(
            'the checkpoint holds nothing that ImageClassifier would load: no name '
            f'begins with {", ".join(_PARTS)}, and it is no published ImageNet file. '
            'If it holds only the backbone, name it in the init_cfg of the backbone.'
        )
    part = {
        name.partition('.')[2]: value
        for name, value in own.items()
        if name.startswith('backbone.') and isinstance(value, Tensor)
    }
    part, target = adapt(backbone, part), tensors_of(backbone)
    found = compare(part, target, allow_missing, allow_unexpected)
    if renamed:
        problems = [*found.problems, *describe_defects(found.fitting)]
        if 'norm.weight' not in target:
            problems.append(
                'The norm before the classification layer has no place in it; with '
                "ResTV2 set out_norm='final', and let out_indices hold stage 4."
            )
    else:  # a missing part may be intended, and MMEngine reports it
        problems = found.problems if found.reshaped else []
    if problems:
        raise CheckpointError(
            f'the checkpoint does not fit the backbone {type(backbone).__name__}. '
            + ' '.join([*explain(backbone, part), *problems])
            + ' If most shapes or many numbered blocks differ, it belongs to another '
            '`arch`.'
        )


@HOOKS.register_module()
class PublishedClassifierHook(Hook):
    """Lets ``load_from`` read published ImageNet checkpoints.

    Configs of classifiers have it in ``default_hooks``. Other checkpoints are not
    changed.
    """

    priority = 'VERY_HIGH'  # before EMAHook, which needs the new names

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        renamed = to_image_classifier(checkpoint)
        if renamed:
            checkpoint.clear()
            checkpoint['state_dict'] = renamed
