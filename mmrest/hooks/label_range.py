"""Name the file of a label image with an index that is no class."""

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS


class LabelRangeError(ValueError):
    """A label image holds an index that is no class of the model."""


@HOOKS.register_module()
class LabelRangeHook(Hook):
    """Check the labels of every batch of a segmentor against its classes.

    Without it such a label ends a training in an index error or a CUDA assertion
    that names no file, and counts for nothing in the metric of a validation.

    Raises:
        LabelRangeError: With the file, the indices and the number of pixels.
    """

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Check a batch of the training."""
        _check(runner.model, data_batch)

    def before_val_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Check a batch of the validation."""
        _check(runner.model, data_batch)

    def before_test_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Check a batch of the test; with augmentations, the first of each image."""
        _check(runner.model, data_batch)


def _check(model, data_batch):
    head = _decode_head(model)
    for sample in data_batch['data_samples']:
        # with test-time augmentation a list, in which all have the same labels
        sample = sample[0] if isinstance(sample, (list, tuple)) else sample
        if 'gt_sem_seg' not in sample:
            continue
        labels = sample.gt_sem_seg.data
        ignored = labels.new_tensor(
            -1 if head.ignore_index is None else head.ignore_index
        )
        wrong = (labels >= head.num_classes) & (labels != ignored)
        if not wrong.any():
            continue
        found = ', '.join(str(label) for label in labels[wrong].unique().tolist())
        shift = ' after reduce_zero_label' if sample.get('reduce_zero_label') else ''
        raise LabelRangeError(
            f'{sample.get("seg_map_path", "a label image")} holds the index {found}'
            f'{shift} in {int(wrong.sum())} pixels, but the model has '
            f'{head.num_classes} classes, 0 to {head.num_classes - 1}, and ignores '
            f'{head.ignore_index}. Correct the file, or num_classes, reduce_zero_label '
            'or ignore_index in the config.'
        )


def _decode_head(model):
    # DistributedDataParallel and the model of test-time augmentation
    while is_model_wrapper(model) or not hasattr(model, 'decode_head'):
        model = model.module
    head = model.decode_head
    return head[-1] if hasattr(head, '__getitem__') else head
