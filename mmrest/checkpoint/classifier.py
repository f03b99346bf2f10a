"""Published ImageNet checkpoints in MMPretrain's ``ImageClassifier``.

A published file holds one flat model: ``stem.*`` to ``norm.*`` and ``head.*``, bare
or under ``model``. MMPretrain's model has the first part under ``backbone.`` and the
linear layer as ``head.fc``, and MMEngine reads ``state_dict`` alone.
"""

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor

from .errors import CheckpointError
from .state_dict import find_state_dict, shared_prefix

HEAD = ('head.weight', 'head.bias')


def to_image_classifier(checkpoint: Any) -> dict[str, Tensor]:
    """Rename the tensors of a published classifier.

    Args:
        checkpoint (Any): What was read from a file.

    Returns:
        dict[str, Tensor]: Names and tensors as ``ImageClassifier`` has them; empty
        if the checkpoint is not of the published form.
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


@HOOKS.register_module()
class PublishedClassifierHook(Hook):
    """Lets ``load_from`` read a published ImageNet checkpoint as it is.

    Configs of classifiers have it among ``default_hooks``. Other checkpoints pass
    unchanged.
    """

    priority = 'VERY_HIGH'  # before EMAHook, which takes the names for granted

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        renamed = to_image_classifier(checkpoint)
        if renamed:
            checkpoint.clear()
            checkpoint['state_dict'] = renamed
