from .attention import ATTN_IMPLS, attention, head_interaction_attention
from .mlp import gelu_mlp

__all__ = ['ATTN_IMPLS', 'attention', 'head_interaction_attention', 'gelu_mlp']
