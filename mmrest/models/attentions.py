"""Attentions of a block: EMSA (section 3.1), and what the paper compares it with.

Each class adds one idea to the one above it. Parameters have other names in each
variant, so that a checkpoint of another variant is refused, and does not compute
something else in silence.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import attention, head_interaction_attention
from .layers import Size, to_map, to_tokens
from .parts import ATTENTIONS


@ATTENTIONS.register_module('msa')
class MSA(nn.Module):
    """Multi-head self-attention, ``softmax(q k^T / sqrt(d)) v`` for each head.

    Args:
        dim (int): Channels of the tokens.
        num_heads (int): Heads; they divide ``dim``.
        sr_ratio (int): Reduction of the map that keys and values see; here
            without effect. Default: 1.
        qkv_bias (bool): Whether queries, keys and values have a bias.
            Default: True.
        attn_drop (float): Dropout on the attention map. Default: 0.
        proj_drop (float): Dropout after the projection. Default: 0.
        attn_impl (str): See :func:`mmrest.ops.attention`. Default: ``'auto'``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        attn_impl: str = 'auto',
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.attn_drop = attn_drop
        self.attn_impl = attn_impl

        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, dim * 2, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        # B, N, C -> B, h, N, d
        q = self._split_heads(self.q(x))
        # B, M, C -> B, M, 2C -> twice B, h, M, d
        k, v = self.kv(self.reduce(x, size)).chunk(2, dim=-1)
        k, v = self._split_heads(k), self._split_heads(v)
        x = self.attend(q, k, v, self.attn_drop if self.training else 0.0)
        # B, h, N, d -> B, N, C
        x = x.transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(x))

    def reduce(self, x: Tensor, size: Size) -> Tensor:
        """The tokens that keys and values come from, of shape (B, M, C)."""
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        """The output of each head, of shape (B, h, N, d)."""
        return attention(q, k, v, self.scale, dropout_p, self.attn_impl)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


REDUCTIONS = ('conv', 'avg', 'max')


@ATTENTIONS.register_module('emsa_without_both')
class ReducedMSA(MSA):
    """MSA whose keys and values come from a smaller map.

    A map of H x W becomes one of ceil(H / sr_ratio) x ceil(W / sr_ratio), and a
    LayerNorm follows. EMSA without interaction of the heads and without
    InstanceNorm.

    Args:
        reduction (str): ``'conv'``, a depthwise convolution, as published;
            ``'avg'`` or ``'max'``, a pooling over the same windows.
            Default: ``'conv'``.

    The other arguments are those of :class:`MSA`.

    Raises:
        ValueError: If ``reduction`` is none of these.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int = 1,
        reduction: str = 'conv',
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, sr_ratio, **kwargs)
        if reduction not in REDUCTIONS:
            raise ValueError(
                f'reduction of an attention must be one of '
                f'{", ".join(map(repr, REDUCTIONS))}, found {reduction!r}'
            )
        self.reduction = reduction
        self.sr_ratio = sr_ratio
        if sr_ratio == 1:
            return
        window = dict(kernel_size=sr_ratio + 1, stride=sr_ratio, padding=sr_ratio // 2)
        if reduction == 'conv':
            self.sr = nn.Conv2d(dim, dim, groups=dim, **window)
            self.sr_norm = nn.LayerNorm(dim)
        elif reduction == 'avg':
            self.sr = nn.AvgPool2d(count_include_pad=False, **window)
            self.avg_norm = nn.LayerNorm(dim)
        else:
            self.sr = nn.MaxPool2d(**window)
            self.max_norm = nn.LayerNorm(dim)

    def reduce(self, x: Tensor, size: Size) -> Tensor:
        if self.sr_ratio == 1:
            return x
        name = 'sr_norm' if self.reduction == 'conv' else f'{self.reduction}_norm'
        return getattr(self, name)(to_tokens(self.sr(to_map(x, size))))


@ATTENTIONS.register_module('emsa_without_norm')
class UnnormalisedEMSA(ReducedMSA):
    """EMSA without InstanceNorm: the score maps of the heads interact alone.

    ``softmax(Conv1x1(scale * q k^T)) v``, with every map stored. With a single
    head there is no interaction. Arguments as in :class:`ReducedMSA`.

    Raises:
        ValueError: If ``attn_impl`` is ``'tiled'``.
    """

    def __init__(self, dim: int, num_heads: int, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        if self.attn_impl == 'tiled':
            raise ValueError(
                "the attention 'emsa_without_norm' has no tiled implementation; take "
                "attn_impl='auto' or 'dense', found 'tiled'"
            )
        if num_heads > 1:
            self.mix_conv = nn.Conv2d(num_heads, num_heads, kernel_size=1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        if self.num_heads == 1:
            return super().attend(q, k, v, dropout_p)
        # B, h, N, M
        maps = self.mix_conv((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        # B, h, N, d
        return F.dropout(maps, dropout_p).to(v.dtype) @ v


@ATTENTIONS.register_module('emsa')
class EMSA(ReducedMSA):
    """Efficient multi-head self-attention, that of the published models.

    Keys and values come from a map that a depthwise convolution has reduced; the
    score maps of the heads interact and are normalised before they meet the
    values. With a single head there is neither interaction nor normalisation.
    Arguments as in :class:`ReducedMSA`; ``attn_impl`` as in
    :func:`mmrest.ops.head_interaction_attention`.
    """

    def __init__(self, dim: int, num_heads: int, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        if num_heads > 1:
            self.transform_conv = nn.Conv2d(num_heads, num_heads, kernel_size=1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        if self.num_heads == 1:
            return super().attend(q, k, v, dropout_p)
        return head_interaction_attention(
            q,
            k,
            v,
            self.transform_conv.weight,
            self.transform_conv.bias,
            self.scale,
            dropout_p=dropout_p,
            attn_impl=self.attn_impl,
        )
