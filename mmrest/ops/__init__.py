from .chunked_mlp import gelu_mlp
from .head_interaction_attention import (
    ATTN_IMPLS,
    attention,
    check_attn_impl,
    dense_head_interaction_attention,
    head_interaction_attention,
)

__all__ = [
    'ATTN_IMPLS',
    'attention',
    'check_attn_impl',
    'dense_head_interaction_attention',
    'gelu_mlp',
    'head_interaction_attention',
]
