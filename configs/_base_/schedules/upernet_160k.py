# UPerNet on ADE20K as with mmseg's Swin: 160,000 iterations.
#
# Batch:  8 GPUs x 2 images = 16 images a step.
# Epochs: 20,210 training images / 16 = 1,264 iterations an epoch, 126.6 epochs.
# Rate:   6e-5 for 16 images; for another batch use `--auto-scale-lr`.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    # from the first iteration on, as in mmseg 0.x
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=160000),
]

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)

auto_scale_lr = dict(enable=False, base_batch_size=16)
