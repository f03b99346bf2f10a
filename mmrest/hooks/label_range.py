"""Check label images for indices that are no class, and name the file."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner


class LabelRangeError(ValueError):
    """A label image has an index that is no class of the model."""


@HOOKS.register_module()
class LabelRangeHook(Hook):
    """Check the labels of every batch of a segmentor against its classes.

    Without it, a training ends with an index error or a CUDA assertion that names no
    file, and the metric of a validation ignores such labels.

    Raises:
        LabelRangeError: With the file, the indices and the number of pixels.
    """

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Check a batch of the training, validation or test."""
        head = _decode_head(runner.model)
        for sample in data_batch['data_samples']:
            # with test-time augmentation, a list of samples with the same labels
            sample = sample[0] if isinstance(sample, (list, tuple)) else sample
            if 'gt_sem_seg' in sample:
                _check(sample, head)

    before_val_iter = before_test_iter = before_train_iter


def _check(sample: Any, head: Any) -> None:
    labels = sample.gt_sem_seg.data
    ignored = labels.new_tensor(-1 if head.ignore_index is None else head.ignore_index)
    wrong = (labels >= head.num_classes) & (labels != ignored)
    if wrong.any():
        found = ', '.join(str(label) for label in labels[wrong].unique().tolist())
        shift = ' after reduce_zero_label' if sample.get('reduce_zero_label') else ''
        raise LabelRangeError(
            f'{sample.get("seg_map_path", "a label image")} holds the index {found}'
            f'{shift} in {int(wrong.sum())} pixels, but the model has '
            f'{head.num_classes} classes, 0 to {head.num_classes - 1}, and ignores '
            f'{head.ignore_index}. Correct the file, or num_classes, reduce_zero_label '
            'or ignore_index in the config.'
        )


def _decode_head(model: Any) -> Any:
    # DistributedDataParallel and the model of test-time augmentation
    while is_model_wrapper(model) or not hasattr(model, 'decode_head'):
        model = model.module
    head = model.decode_head
    return head[-1] if hasattr(head, '__getitem__') else head
