"""MMSegmentation's segmentors from pixels to labels, as exportable modules."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmseg.models.utils import Upsample
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from .preprocessing import Preprocess, require, side_of
from .verification import MASK, Arrays, Differences


class Segmentor(nn.Module):
    """An ``EncoderDecoder`` on whole images.

    Args:
        model (nn.Module): MMSegmentation's model.

    Raises:
        ExportError: If it uses sliding windows, or pads images to a fixed size.
    """

    task = 'segmentation'
    input_names = ('image', 'size')
    output_names = ('labels',)
    has_batch = True
    score_threshold = None

    def __init__(self, model: Any) -> None:
        super().__init__()
        mode = model.test_cfg.get('mode', 'whole')
        require(mode == 'whole', 'test_cfg.mode', "'whole'", mode)
        head, given = model.decode_head, model.data_preprocessor
        require(head.out_channels > 1, 'decode_head.out_channels', '2 or more', '1')
        padding = given.test_cfg or {}
        is_free = padding.get('size') is None
        require(is_free, 'data_preprocessor.test_cfg', 'without size', dict(padding))
        self.preprocess = Preprocess.of(
            given,
            to_bgr=not given.channel_conversion,
            divisor=padding.get('size_divisor') or 1,
            pad_value=given.pad_val,
        )
        self.model, self.num_classes = model, head.num_classes
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, Upsample):
                    setattr(module, name, _with_free_sizes(child))

    def forward(self, image: Tensor, size: Tensor) -> Tensor:
        """Segment images.

        Args:
            image (Tensor): Of shape (B, H, W, 3), type uint8, RGB.
            size (Tensor): Height and width of the labels, of type int64.

        Returns:
            Tensor: Labels of type int64 and shape (B, height, width).
        """
        x = self.preprocess(image)
        logits = self.model.decode_head(self.model.extract_feat(x))
        logits = self.resize(logits, (x.shape[2], x.shape[3]))
        logits = logits[:, :, : image.shape[1], : image.shape[2]]
        logits = self.resize(logits, (side_of(size, 0), side_of(size, 1)))
        return logits.argmax(dim=1)

    def resize(self, x: Tensor, size: tuple) -> Tensor:
        """Resize logits as MMSegmentation does."""
        corners = self.model.align_corners
        return F.interpolate(x, size, mode='bilinear', align_corners=corners)

    @torch.no_grad()
    def predict(self, image: np.ndarray, size: np.ndarray) -> Arrays:
        """Return MMSegmentation's prediction for the arguments of ``forward``."""
        shape = image.shape[1:3]
        meta = dict(img_shape=shape, ori_shape=tuple(size.tolist()))
        pixels = [torch.from_numpy(x).permute(2, 0, 1).flip(0) for x in image]
        samples = [SegDataSample(metainfo=meta) for _ in pixels]
        found = self.model.test_step(dict(inputs=pixels, data_samples=samples))
        labels = [sample.pred_sem_seg.data[0] for sample in found]
        return dict(labels=torch.stack(labels).numpy())

    def compare(self, found: Arrays, expected: Arrays) -> tuple[Differences, str]:
        """Return the difference, and what was compared."""
        part = float((found['labels'] != expected['labels']).mean())
        count = f'{len(np.unique(expected["labels"]))} classes'
        return [(part / MASK, f'{part:.2%} of the labels')], count


def _with_free_sizes(layer: Upsample) -> nn.Module:
    """PyTorch's layer, since MMSegmentation's ``int(size * factor)`` is a constant."""
    return nn.Upsample(layer.size, layer.scale_factor, layer.mode, layer.align_corners)
