# 30 epochs at 384x384, from weights trained at 224x224, as ResTv2 was fine-tuned.
#
# Batch:  8 GPUs x 64 images = 512 images a step.
# Rate:   1.5e-5. For another batch `--auto-scale-lr` multiplies it by
#         (GPUs x images a GPU) / 512.
# Ours:   the rate at the end, and that there is no warm-up.
_base_ = './imagenet_300e.py'

train_cfg = dict(max_epochs=30)
param_scheduler = [
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=True, begin=0, end=30),
]
optim_wrapper = dict(
    optimizer=dict(lr=1.5e-5, weight_decay=1e-8), clip_grad=dict(max_norm=1.0)
)

auto_scale_lr = dict(base_batch_size=512)
