"""ResT, an efficient multi-scale vision Transformer (arXiv:2105.13677).

The file is in reading order: embeddings, blocks, network. Each of the four stages is an
embedding (the stem, or a patch embedding that halves the map), which also encodes the
position, followed by Transformer blocks. Blocks take tokens of shape (B, H * W, C).
Seen as a map of shape (B, C, H, W), the same memory is in channels_last order, so
:func:`to_map` and :func:`to_tokens` copy nothing.

Parameters are named as in the published ImageNet checkpoints. Freezing, initial weights
and the like are in :mod:`mmrest.models.base`, and the variants of the paper's ablations
in :mod:`mmrest.models.rest_ablations`.
"""

from collections.abc import Sequence
from typing import NamedTuple, Optional, Union

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..ops import (
    attention,
    check_attn_impl,
    dense_head_interaction_attention,
    gelu_mlp,
    head_interaction_attention,
)
from ..ops.fast_path import is_plain, is_watched
from .base import BaseResT
from .utils import (
    PartCfg,
    build_part,
    check_norm_cfg,
    checkpoint_module,
    depthwise_conv,
    match_gradient_strides,
    reduce_map,
    resolve_arch,
    to_map,
    to_tokens,
)

Size = tuple[int, int]


class Arch(NamedTuple):
    """Sizes of the four stages."""

    embed_dims: tuple[int, ...]
    num_heads: tuple[int, ...]
    depths: tuple[int, ...]
    sr_ratios: tuple[int, ...]
    mlp_ratios: tuple[float, ...] = (4, 4, 4, 4)


# Table 1 of the paper
ARCHS: dict[str, Arch] = {
    'lite': Arch((64, 128, 256, 512), (1, 2, 4, 8), (2, 2, 2, 2), (8, 4, 2, 1)),
    'small': Arch((64, 128, 256, 512), (1, 2, 4, 8), (2, 2, 6, 2), (8, 4, 2, 1)),
    'base': Arch((96, 192, 384, 768), (1, 2, 4, 8), (2, 2, 6, 2), (8, 4, 2, 1)),
    'large': Arch((96, 192, 384, 768), (1, 2, 4, 8), (2, 2, 18, 2), (8, 4, 2, 1)),
}


# ---------------------------------------------------------------- embeddings


@MODELS.register_module('rest_pos_pa')
class PixelAttention(nn.Module):
    """``x * sigmoid(DWConv3x3(x))``, the positional encoding (section 3.3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pa_conv = depthwise_conv(dim, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.pa_conv(x).sigmoid()


@MODELS.register_module('rest_stem_rest')
class Stem(nn.Module):
    """Three 3x3 convolutions with strides 2, 1, 2, and the positional encoding.

    An image (B, in_channels, H, W) becomes a map (B, dim, ceil(H / 4), ceil(W / 4)).
    """

    def __init__(
        self, in_channels: int, dim: int, norm_cfg: dict, pos: nn.Module
    ) -> None:
        super().__init__()
        mid = dim // 2
        self.conv1 = nn.Conv2d(in_channels, mid, 3, stride=2, padding=1, bias=False)
        self.norm1 = build_norm_layer(norm_cfg, mid)[1]
        self.conv2 = nn.Conv2d(mid, mid, 3, stride=1, padding=1, bias=False)
        self.norm2 = build_norm_layer(norm_cfg, mid)[1]
        self.conv3 = nn.Conv2d(mid, dim, 3, stride=2, padding=1, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.pos = pos

    def forward(self, x: Tensor) -> Tensor:
        # B, in_channels, H, W -> B, dim / 2, H / 2, W / 2
        x = self.act(self.norm1(self.conv1(x)))
        x = self.act(self.norm2(self.conv2(x)))
        # -> B, dim, H / 4, W / 4
        return self.pos(self.conv3(x))


class PatchEmbed(nn.Module):
    """Stages 2 to 4: a 3x3 convolution with stride 2, and the positional encoding.

    A map of shape (B, in_dim, H, W) becomes (B, dim, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, in_dim: int, dim: int, norm_cfg: dict, pos: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1)
        self.norm = build_norm_layer(norm_cfg, dim)[1]
        self.pos = pos

    def forward(self, x: Tensor) -> Tensor:
        return self.pos(self.norm(self.conv(x)))


# ---------------------------------------------------------------- blocks


class EMSA(nn.Module):
    """Efficient multi-head self-attention (section 3.1).

    A depthwise convolution reduces the map from which keys and values are computed.
    With several heads, a 1x1 convolution mixes their score maps, and an InstanceNorm
    follows the softmax (equation 4). A single head is plain attention.

    Args:
        dim (int): Channels C of the tokens.
        num_heads (int): Heads h. Must divide ``dim``.
        sr_ratio (int): Spatial reduction of keys and values, to a map of
            ceil(H / sr_ratio) x ceil(W / sr_ratio). Default: 1.
        qkv_bias (bool): Whether queries, keys and values have a bias.
            Default: True.
        attn_drop (float): Dropout on the attention map. Default: 0.
        proj_drop (float): Dropout after the projection. Default: 0.
        attn_impl (str): See :func:`mmrest.ops.head_interaction_attention`.
            Default: ``'auto'``.
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
        self.sr_ratio = sr_ratio
        self.attn_drop = attn_drop
        self.attn_impl = check_attn_impl(attn_impl)

        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, dim * 2, bias=qkv_bias)
        if sr_ratio > 1:
            self.sr: nn.Module = depthwise_conv(
                dim, kernel_size=sr_ratio + 1, stride=sr_ratio, padding=sr_ratio // 2
            )
            self.sr_norm = nn.LayerNorm(dim)
        if num_heads > 1:
            self.transform_conv = nn.Conv2d(num_heads, num_heads, kernel_size=1)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        # B, N, C -> B, h, N, d
        q = self.split_heads(self.q(x))
        # B, N, C -> B, M, C -> B, M, 2C -> k and v: B, M, C -> B, h, M, d
        k, v = self.kv(self.reduce(x, size)).chunk(2, dim=-1)
        x = self.attend(q, self.split_heads(k), self.split_heads(v))
        # B, h, N, d -> B, N, C
        x = x.transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(x))

    def reduce(self, x: Tensor, size: Size) -> Tensor:
        """Reduce the tokens for keys and values, to shape (B, M, C)."""
        if self.sr_ratio == 1:
            return x
        # B, N, C -> B, C, H, W -> B, C, H / sr, W / sr -> B, M, C
        return self.sr_norm(to_tokens(reduce_map(self.sr, to_map(x, size))))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend in each head; the result has shape (B, h, N, d)."""
        drop = self.attn_drop if self.training else 0.0
        if self.num_heads == 1:
            return attention(q, k, v, self.scale, drop, self.attn_impl)
        if self.attn_impl == 'dense' or self._must_call_transform_conv(q):
            return dense_head_interaction_attention(
                q, k, v, self.transform_conv, self.scale, dropout_p=drop
            )
        return head_interaction_attention(
            q,
            k,
            v,
            self.transform_conv.weight,
            self.transform_conv.bias,
            self.scale,
            dropout_p=drop,
            attn_impl=self.attn_impl,
        )

    def split_heads(self, x: Tensor) -> Tensor:
        """B, N, C -> B, h, N, d"""
        shape = (x.shape[0], x.shape[1], self.num_heads, self.head_dim)
        return x.reshape(shape).transpose(1, 2)

    def _must_call_transform_conv(self, q: Tensor) -> bool:
        """Whether using its weight without calling it could make a difference."""
        conv = self.transform_conv
        if not is_plain(conv, nn.Conv2d):
            return True
        if conv.weight.shape != (self.num_heads, self.num_heads, 1, 1):
            return True
        # compilers can record the tiled operator
        return is_watched(q) and not torch.compiler.is_compiling()


class Mlp(nn.Module):
    """Linear, GELU, linear, on each token."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_mlp(x, self.fc1, self.act, self.drop, self.fc2)


class Block(nn.Module):
    """``x + attn(LN(x))``, then ``x + MLP(LN(x))`` (equations 7 and 8)."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, size: Size) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.ModuleList):
    """The blocks of a stage.

    They take tokens (B, H * W, C) and the ``size`` (H, W) of their map.
    """

    with_cp = False

    def forward(self, x: Tensor, size: Size) -> Tensor:
        for block in self:
            x = checkpoint_module(block, x, size) if self.with_cp else block(x, size)
        return x


# ---------------------------------------------------------------- the network


@MODELS.register_module()
class ResT(BaseResT):
    """ResT backbone.

    Args:
        arch (str | dict): ``'lite'``, ``'small'``, ``'base'``, ``'large'``, or a
            dict with ``embed_dims``, ``num_heads``, ``depths``, ``sr_ratios`` (four
            integers each; ``sr_ratios`` are 1 or even) and ``mlp_ratios`` (four
            numbers or one, default 4). Default: ``'small'``.
        in_channels (int): Channels of the image. Default: 3.
        out_indices (Sequence[int]): Stages whose maps are returned, in ascending
            order, counted from 0. Stages after the last one are not built.
            Default: (0, 1, 2, 3).
        qkv_bias (bool): Whether queries, keys and values have a bias.
            Default: True.
        drop_rate (float): Dropout after the attention's projection and in the
            MLP. Default: 0.
        attn_drop_rate (float): Dropout on the attention maps. Default: 0.
        drop_path_rate (float): Stochastic depth rate of the last block. The rate
            rises linearly from 0 in the first block. Default: 0.
        frozen_stages (int): -1 freezes nothing, 0 the stem, k the stem and stages
            1 to k with their patch embeddings: no gradients, norms in evaluation
            mode. The output norms stay trainable, since ImageNet checkpoints lack
            those of stages 1 to 3. Default: -1.
        norm_eval (bool): Whether all BatchNorms stay in evaluation mode.
            Default: False.
        with_cp (bool): Whether stem, patch embeddings and blocks recompute their
            activations in the backward pass instead of storing them. BatchNorms
            still update their statistics once. Default: False.
        norm_cfg (dict): Config of the norms in stem and patch embeddings.
            Default: ``dict(type='BN')``.
        out_norm (str): ``'chain'``, as in the published detectors: the next stage
            receives the normalised map of a requested stage. ``'branch'``: it
            receives the map before the norm. Default: ``'chain'``.
        attn_impl (str): ``'auto'``, ``'tiled'``, ``'triton'``, ``'amx'`` or
            ``'dense'``, see :func:`mmrest.ops.head_interaction_attention`.
            Default: ``'auto'``.
        stem_cfg (str | dict): ``'rest'``, ``'resnet'`` or ``'patch'``, or a dict with
            one of these as ``type`` and with options, see
            :mod:`mmrest.models.rest_ablations`. Default: ``'rest'``.
        pos_cfg (str | dict): The positional encoding of every stage: ``'pa'`` (pixel
            attention), ``'gl'`` (a residual depthwise convolution), ``'le'`` (a
            learnable embedding), ``'none'``, or any registered module that keeps the
            shape of a map; or a dict, as above. Default: ``'pa'``.
        attn_cfg (str | dict): ``'emsa'``, ``'emsa_without_norm'``,
            ``'emsa_without_both'`` or ``'msa'``; or a dict, as above.
            Default: ``'emsa'``.
        pretrained (str, optional): A checkpoint. Deprecated, use ``init_cfg``.
        init_cfg (dict | list[dict], optional): ``dict(type='Pretrained',
            checkpoint=...)`` loads a checkpoint by
            :func:`mmrest.checkpoint.load_pretrained`, whose arguments ``prefix`` and
            ``adapt_input`` it may also hold. Default: None, which draws weights from a
            truncated normal distribution with standard deviation 0.02.

    Raises:
        ValueError: If an argument has a value other than those above.

    Example:
        >>> import torch
        >>> from mmrest import ResT
        >>> model = ResT(arch='lite').eval()
        >>> with torch.no_grad():
        ...     outs = model(torch.rand(1, 3, 250, 333))
        >>> [tuple(out.shape) for out in outs]
        [(1, 64, 63, 84), (1, 128, 32, 42), (1, 256, 16, 21), (1, 512, 8, 11)]
    """

    generation = 'ResT'
    embed_names = ('stem', 'patch_embed_2', 'patch_embed_3', 'patch_embed_4')
    # stage 4 has the final norm of the classifier
    out_norm_names = ('norm1', 'norm2', 'norm3', 'norm')

    def __init__(
        self,
        arch: Union[str, dict] = 'small',
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        norm_cfg: dict = dict(type='BN'),  # noqa: B006
        out_norm: str = 'chain',
        attn_impl: str = 'auto',
        stem_cfg: PartCfg = 'rest',
        pos_cfg: PartCfg = 'pa',
        attn_cfg: PartCfg = 'emsa',
        pretrained: Optional[str] = None,
        init_cfg: Union[dict, list, None] = None,
    ) -> None:
        super().__init__(
            resolve_arch(arch, ARCHS),
            in_channels,
            out_indices,
            frozen_stages,
            norm_eval,
            with_cp,
            attn_impl,
            pretrained,
            init_cfg,
        )
        if out_norm not in ('chain', 'branch'):
            raise ValueError(
                f"out_norm must be 'chain' or 'branch', found {out_norm!r}"
            )
        self.out_norm = out_norm
        check_norm_cfg(norm_cfg)

        dims, heads, depths, sr_ratios, mlp_ratios = self.arch
        drop_paths = self.drop_path_rates(drop_path_rate)
        for i in range(self.num_stages):
            pos = build_part('pos', pos_cfg, dim=dims[i], map_stride=4 * 2**i)
            if i == 0:
                self.stem = build_part(
                    'stem',
                    stem_cfg,
                    in_channels=in_channels,
                    dim=dims[0],
                    norm_cfg=norm_cfg,
                    pos=pos,
                )
            else:
                patch_embed = PatchEmbed(dims[i - 1], dims[i], norm_cfg, pos)
                self.add_module(self.embed_names[i], patch_embed)
            stage = Stage(
                Block(
                    dim=dims[i],
                    attn=build_part(
                        'attn',
                        attn_cfg,
                        dim=dims[i],
                        num_heads=heads[i],
                        sr_ratio=sr_ratios[i],
                        qkv_bias=qkv_bias,
                        attn_drop=attn_drop_rate,
                        proj_drop=drop_rate,
                        attn_impl=attn_impl,
                    ),
                    mlp_ratio=mlp_ratios[i],
                    drop=drop_rate,
                    drop_path=drop_paths[i][j],
                )
                for j in range(depths[i])
            )
            stage.with_cp = with_cp
            self.add_module(f'stage{i + 1}', stage)
        for i in self.out_indices:
            self.add_module(self.out_norm_names[i], nn.LayerNorm(dims[i]))
        match_gradient_strides(self)
        self.freeze_stages()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps of the requested stages.

        Args:
            x (Tensor): Images of any size, of shape (B, in_channels, H, W).

        Returns:
            tuple[Tensor, ...]: For each i in ``out_indices`` a contiguous map of shape
            (B, C_i, ceil(H / 4 / 2**i), ceil(W / 4 / 2**i)).
        """
        x = self.prepare_image(x)
        outs = []
        for i in range(self.num_stages):
            # B, C, H, W -> B, C_i, H_i, W_i
            x = self.embed(i, x)
            size = (x.shape[2], x.shape[3])
            # B, C_i, H_i, W_i -> B, N, C_i
            x = self.stage(i)(to_tokens(x), size)
            if i in self.out_indices:
                out = getattr(self, self.out_norm_names[i])(x)
                if self.out_norm == 'chain':
                    x = out
                # contiguous, since mmcv's RoIAlign misreads channels_last maps on CPUs
                outs.append(to_map(out, size).contiguous())
            x = to_map(x, size)
        return tuple(outs)
