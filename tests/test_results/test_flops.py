"""Counts of multiply-accumulates."""

import pytest
import torch
from mmengine.analysis import FlopAnalyzer

from mmrest import ResT
from mmrest.ops import attention, head_interaction_attention
from mmrest.utils.complexity import HANDLES, complexity

# 10^9 operations of the classifiers at 224x224 as published (one digit).
PUBLISHED = {'lite': 1.4, 'small': 1.9, 'base': 4.3, 'large': 7.9}


class Attention(torch.nn.Module):
    def __init__(self, heads, attn_impl):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(heads))
        self.attn_impl = attn_impl

    def forward(self, q, k, v):
        if len(self.weight) == 1:
            return attention(q, k, v, attn_impl=self.attn_impl)
        return head_interaction_attention(
            q, k, v, self.weight, attn_impl=self.attn_impl
        )


@pytest.mark.parametrize('attn_impl', ['dense', 'auto'])
@pytest.mark.parametrize('heads', [1, 4])
@torch.no_grad()
def test_attention_by_hand(heads, attn_impl):
    n, m, d = 30, 7, 5
    q, k = torch.rand(2, heads, n, d), torch.rand(2, heads, m, d)
    analyzer = FlopAnalyzer(Attention(heads, attn_impl).eval(), (q, k, k))
    analyzer.set_op_handle(**HANDLES).unsupported_ops_warnings(False)
    products = 2 * (2 * heads * n * m * d)
    mixing_and_norm = 2 * heads * n * m * (heads + 4) if heads > 1 else 0
    assert analyzer.total() == products + mixing_and_norm


@pytest.mark.parametrize(
    'arch',
    [
        'lite',
        'small',
        'base',
        pytest.param('large', marks=pytest.mark.slow),
    ],
)
def test_backbones_are_close_to_the_published_figures(arch):
    counts = {
        attn_impl: complexity(ResT(arch, attn_impl=attn_impl), (224, 224)).flops
        for attn_impl in ('dense', 'tiled')
    }
    assert counts['dense'] == counts['tiled']
    # Ours counts more: the attention's products and the norms.
    ratio = counts['dense']['total'] / 1e9 / PUBLISHED[arch]
    assert 1.0 < ratio < 1.12
