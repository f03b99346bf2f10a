# schedule_3x.py as ResTv2 was trained: in mixed precision, and with the norm of the
# gradient of the whole model clipped.
#
# MMEngine's AmpOptimWrapper computes in float16 and needs a GPU. Elsewhere, and for
# bfloat16: `tools/train.py --amp bfloat16`; for float32:
# `--cfg-options optim_wrapper.type=OptimWrapper`.
_base_ = './schedule_3x.py'

optim_wrapper = dict(type='AmpOptimWrapper', clip_grad=dict(max_norm=0.01))
