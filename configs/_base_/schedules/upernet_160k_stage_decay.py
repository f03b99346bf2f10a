# upernet_160k.py with the optimizer of ResTv2-Small and -Base: each stage learns at 0.9
# times the rate of the next one.
_base_ = './upernet_160k.py'

optim_wrapper = dict(
    constructor='LayerDecayOptimWrapperConstructor',
    optimizer=dict(lr=1.5e-4, weight_decay=0.05),
    paramwise_cfg=dict(
        layer_decay_rate=0.9,
        decay_type='stage_wise',
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,
    ),
)
