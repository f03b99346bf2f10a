# rest_base_fpn_1x.py with parameters, gradients and optimizer shared out over the
# GPUs: each holds a part of them and gathers one block of ResT at a time.
_base_ = './rest_base_fpn_1x.py'

runner_type = 'FlexibleRunner'
strategy = dict(
    type='BlockFSDPStrategy',
    model_wrapper=dict(
        type='MMFullyShardedDataParallel',
        auto_wrap_policy='rest_block_wrap_policy',
        # frozen and trained parameters meet in a unit, and each has its own options
        use_orig_params=True,
    ),
    state_dict_cfg='full',
)
