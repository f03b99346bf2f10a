# Mask R-CNN with a small ResT on generated fruit, for `make demo`, which two CPU cores
# can train within minutes. projects/demo/run.py generates the data and sets the paths.
# Without pretraining, bbox AP50 is 0.68 after 60 iterations, 0.93 after 120, and
# 0.95 to 0.96 after all 300 (segm AP50 0.96 to 0.97), on 100 held-back images.
_base_ = ['../_base_/models/mask_rcnn_rest_tiny_fpn.py', './coco_minutes.py']

# Arguments of projects/demo/fruitset
fruit_set = dict(num_train=600, num_val=100, size=160, seed=0)

num_classes = 4
# Anchors have sides of 16 to 128 pixels, and the fruit 24 to 75.
model = dict(
    roi_head=dict(
        bbox_head=dict(num_classes=num_classes, reg_class_agnostic=True),
        mask_head=dict(num_classes=num_classes),
    ),
    # Few samples, since there are at most six objects in an image.
    # ignore_iof_thr: boxes in a crowd are neither objects nor background.
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
