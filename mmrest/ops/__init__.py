from .attention import ATTN_IMPLS, attention, head_interaction_attention

__all__ = ['ATTN_IMPLS', 'attention', 'head_interaction_attention']
