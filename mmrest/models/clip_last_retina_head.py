"""RetinaNet's head with boxes that are clipped after the NMS.

Import it by ``custom_imports``. It needs mmdet, which ``import mmrest`` does not.
"""

from typing import Any, Optional

from mmdet.models.dense_heads import RetinaHead
from mmdet.registry import MODELS
from mmengine.structures import InstanceData


@MODELS.register_module()
class ClipLastRetinaHead(RetinaHead):
    """RetinaHead that clips boxes to the image after the NMS instead of before.

    The published detectors apply the NMS to unclipped boxes. Boxes that reach beyond
    the image overlap differently once they are clipped, and then other boxes may
    remain. Parameters and training are those of RetinaHead. It needs
    ``bbox_coder=dict(clip_border=False)``.

    Raises:
        ValueError: If the coder clips.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.bbox_coder.clip_border:
            raise ValueError(
                'ClipLastRetinaHead needs bbox_coder.clip_border=False, found True'
            )

    def _bbox_post_process(
        self,
        results: InstanceData,
        cfg: Any,
        rescale: bool = False,
        with_nms: bool = True,
        img_meta: Optional[dict] = None,
    ) -> InstanceData:
        results = super()._bbox_post_process(results, cfg, rescale, with_nms, img_meta)
        assert img_meta is not None  # mmdet gives it
        height, width = img_meta['ori_shape' if rescale else 'img_shape'][:2]
        boxes = results.bboxes
        boxes[:, 0::2].clamp_(min=0, max=width)
        boxes[:, 1::2].clamp_(min=0, max=height)
        return results[((boxes[:, 2:] - boxes[:, :2]) > 0).all(dim=1)]
