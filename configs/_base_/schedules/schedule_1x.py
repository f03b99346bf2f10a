# The published 1x schedule, counted in iterations.
#
# Batch:  8 GPUs x 2 images = 16 images a step.
# Epochs: COCO train2017 has 117,266 images with annotations;
#         117,266 / 16 = 7,330 iterations an epoch (rounded up);
#         90,000 / 7,330 = 12.28 epochs.
# Steps:  60,000 / 7,330 = 8.19 and 80,000 / 7,330 = 10.91 epochs.
# Rate:   1e-4 for 16 images. For another batch `--auto-scale-lr` multiplies it by
#         (GPUs x images a GPU) / 16, e.g. 1 GPU x 2 images: 1e-4 x 2/16 = 1.25e-5;
#         multiply the iterations by 16 / batch as well to see as many images.
# Resume: MMEngine first draws the batches of all past iterations again, as fast as
#         the workers load them, so that the order of the data goes on unchanged.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=90000, val_interval=10000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    # From 1e-4 x 1/1000 = 1e-7 up to 1e-4.
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    # 1e-4, 1e-5 from 60,000, 1e-6 from 80,000.
    dict(
        type='MultiStepLR',
        by_epoch=False,
        begin=0,
        end=90000,
        milestones=[60000, 80000],
        gamma=0.1,
    ),
]

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # No decay on norms; on biases the published 1e-4 = 0.05 x 0.002.
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.002),
    # The published 1x runs do not clip gradients.
)

auto_scale_lr = dict(enable=False, base_batch_size=16)
