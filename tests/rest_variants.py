"""A tiny ResT in every variant, for the tests and for the processes they start."""

from weights_rule import fill

from mmrest import ResT

TINY = dict(
    embed_dims=[8, 16, 24, 32],
    num_heads=[1, 2, 3, 4],
    depths=[1, 1, 1, 1],
    sr_ratios=[8, 4, 2, 1],
    mlp_ratios=2,
)
VARIANTS = {
    'published': {},
    'stem_resnet': dict(stem_cfg='resnet'),
    'stem_patch': dict(stem_cfg='patch'),
    'pos_gl': dict(pos_cfg='gl'),
    'pos_le': dict(pos_cfg=dict(type='le', image_size=64)),
    'pos_none': dict(pos_cfg='none'),
    'pos_foreign': dict(pos_cfg=dict(type='ContextBlock', ratio=0.5)),
    'attn_without_norm': dict(attn_cfg='emsa_without_norm'),
    'attn_without_both': dict(attn_cfg='emsa_without_both'),
    'attn_msa': dict(attn_cfg='msa'),
    'attn_avg': dict(attn_cfg=dict(type='emsa', reduction='avg')),
    'attn_max': dict(attn_cfg=dict(type='emsa', reduction='max')),
}
OTHERS = [name for name in VARIANTS if name != 'published']


def tiny(variant: str, **options) -> ResT:
    """A variant with the weights that the rule draws from the parameters' names."""
    model = ResT(TINY, **VARIANTS[variant], **options)
    fill(model.state_dict())
    return model
