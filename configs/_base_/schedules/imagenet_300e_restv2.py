# 300 epochs on ImageNet as ResTv2 was trained.
#
# Batch:  8 GPUs x 256 images = 2048 images a step.
# Rate:   1.5e-4 for 256 images, hence 1.2e-3 for 2048. For another batch
#         `--auto-scale-lr` multiplies 1.2e-3 by (GPUs x images a GPU) / 2048.
# Ours:   the rates at the start and at the end, which are those of imagenet_300e.py for
#         this batch.
_base_ = './imagenet_300e.py'

param_scheduler = [
    # From 4e-6 up to 1.2e-3.
    dict(
        type='LinearLR',
        start_factor=1 / 300,
        by_epoch=True,
        begin=0,
        end=50,
        convert_to_iter_based=True,
    ),
    dict(type='CosineAnnealingLR', eta_min=4e-5, by_epoch=True, begin=50, end=300),
]

optim_wrapper = dict(optimizer=dict(lr=1.2e-3), clip_grad=dict(max_norm=1.0))

auto_scale_lr = dict(base_batch_size=2048)
