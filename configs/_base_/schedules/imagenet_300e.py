# 300 epochs on ImageNet, as the defaults of the authors' training script have them.
#
# Batch:  8 GPUs x 128 images = 1024 images a step (theirs: 8 x 256).
# Rate:   5e-4 for 512 images, hence 1e-3 for 1024; so are the rates at the start
#         (1e-6 for 512) and at the end (1e-5 for 512). For another batch
#         `--auto-scale-lr` multiplies 1e-3 by (GPUs x images a GPU) / 1024.
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=300, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    # From 2e-6 up to 1e-3.
    dict(
        type='LinearLR',
        start_factor=0.002,
        by_epoch=True,
        begin=0,
        end=5,
        convert_to_iter_based=True,
    ),
    dict(type='CosineAnnealingLR', eta_min=2e-5, by_epoch=True, begin=5, end=300),
]

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    # No decay on norms, biases and other vectors.
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)

auto_scale_lr = dict(enable=False, base_batch_size=1024)
