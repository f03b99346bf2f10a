"""Boxes are clipped to the image, and only after the NMS."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

pytest.importorskip('mmdet')
from mmdet.models.dense_heads import RetinaHead  # noqa: E402

from mmrest.models.clip_last_retina_head import ClipLastRetinaHead  # noqa: E402

HEAD = dict(
    num_classes=2,
    in_channels=4,
    feat_channels=4,
    stacked_convs=1,
    anchor_generator=dict(
        type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[8]
    ),
    bbox_coder=dict(type='DeltaXYWHBBoxCoder', clip_border=False),
    test_cfg=Config(
        dict(
            nms_pre=100,
            min_bbox_size=0,
            score_thr=0.0,
            nms=dict(type='nms', iou_threshold=0.3),
            max_per_img=100,
        )
    ),
)


@pytest.mark.parametrize('rescale', [False, True])
def test_boxes_are_clipped_to_the_image_after_the_nms(rescale):
    maps = [torch.randn(1, 2, 5, 9)], [torch.randn(1, 4, 5, 9)]
    meta = dict(img_shape=(40, 72), ori_shape=(20, 36), scale_factor=(2.0, 2.0))
    height, width = meta['ori_shape' if rescale else 'img_shape']
    options = dict(batch_img_metas=[meta], rescale=rescale)
    with DefaultScope.overwrite_default_scope('mmdet'):
        heads = ClipLastRetinaHead(**HEAD), RetinaHead(**HEAD)
    found, unclipped = (head.predict_by_feat(*maps, **options)[0] for head in heads)
    limits = torch.tensor([width, height, width, height])
    expected = unclipped.bboxes.clamp(min=0).minimum(limits)
    keep = (expected[:, 2:] > expected[:, :2]).all(dim=1)
    assert torch.equal(found.bboxes, expected[keep])
    assert torch.equal(found.scores, unclipped.scores[keep])
    # that the maps show it: some boxes reach beyond each edge
    assert (found.bboxes[:, :2] == 0).any(0).all()
    assert (found.bboxes[:, 2:] == limits[2:]).any(0).all()
