"""What a detector is trained on for one step."""

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData


@pytest.fixture
def training_batch():
    """One image of 96x64 pixels with two objects: training_batch(masks)."""

    def make(masks):
        from mmdet.structures import DetDataSample
        from mmdet.structures.mask import PolygonMasks

        boxes = torch.tensor([[4.0, 4.0, 60.0, 50.0], [50.0, 20.0, 90.0, 60.0]])
        objects = InstanceData(bboxes=boxes, labels=torch.tensor([0, 5]))
        if masks:
            corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()
            objects.masks = PolygonMasks([[corner] for corner in corners], 64, 96)
        shape = dict(img_shape=(64, 96), ori_shape=(64, 96), scale_factor=(1.0, 1.0))
        sample = DetDataSample(metainfo=shape, gt_instances=objects)
        pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 96), dtype=np.uint8)
        return dict(inputs=[torch.from_numpy(pixels)], data_samples=[sample])

    return make
