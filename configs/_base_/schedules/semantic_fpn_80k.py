# Semantic FPN on ADE20K as the PVT authors trained it: 80,000 iterations.
#
# Batch:  8 GPUs x 2 images = 16 images a step.
# Epochs: 20,210 training images / 16 = 1,264 iterations an epoch, 63.3 epochs.
# Rate:   1e-4 for 16 images; for another batch use `--auto-scale-lr`.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=80000, val_interval=8000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False, begin=0, end=80000),
]

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-4),
)

auto_scale_lr = dict(enable=False, base_batch_size=16)
