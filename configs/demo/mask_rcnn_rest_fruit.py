# Mask R-CNN with a small ResT on the generated fruit, for `make demo`: everything
# sized so that two CPU cores train it within minutes. projects/demo/run.py generates
# the data and fills in the paths. No pretraining: 60 iterations give bbox AP50 0.68,
# 120 give 0.93, all 300 give 0.96 (segm AP50 0.96) on the 100 held-back images.
_base_ = ['../_base_/models/mask_rcnn_rest_tiny_fpn.py', './coco_minutes.py']

# What projects/demo/fruitset generates.
fruit_set = dict(num_train=600, num_val=100, size=160, seed=0)

num_classes = 4
# The anchors' sides are 16 to 128 pixels; the fruit measures 24 to 75.
model = dict(
    roi_head=dict(
        bbox_head=dict(num_classes=num_classes, reg_class_agnostic=True),
        mask_head=dict(num_classes=num_classes),
    ),
    # Few samples: there are at most six objects in a picture.
    # ignore_iof_thr: what lies in a crowd is neither object nor background.
    train_cfg=dict(
        rpn=dict(
            assigner=dict(min_pos_iou=0.3, ignore_iof_thr=0.5),
            sampler=dict(num=64),
        ),
        rcnn=dict(
            assigner=dict(match_low_quality=True, ignore_iof_thr=0.5),
            sampler=dict(num=32),
        ),
    ),
    test_cfg=dict(rcnn=dict(max_per_img=20)),
)
