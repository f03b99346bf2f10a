"""The layers of ResT, in the order in which an image meets them.

Between layers, features are tokens of shape (B, H * W, C). The same memory seen
as a map of shape (B, C, H, W) is in channels_last order, so going from one to the
other (:func:`to_map`, :func:`to_tokens`) copies nothing.
"""

from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn

from ..ops import attention, gelu_mlp, head_interaction_attention

Size = tuple[int, int]


def to_map(x: Tensor, size: Size) -> Tensor:
    """Tokens (B, H * W, C) as a map (B, C, H, W)."""
    return x.unflatten(1, size).permute(0, 3, 1, 2)


def to_tokens(x: Tensor) -> Tensor:
    """A map (B, C, H, W) as tokens (B, H * W, C)."""
    # a map in another memory format than channels_last is copied here
    return x.permute(0, 2, 3, 1).flatten(1, 2)


class PixelAttention(nn.Module):
    """Positional encoding ``x * sigmoid(DWConv3x3(x))`` (section 3.3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pa_conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.pa_conv(x).sigmoid()


class Stem(nn.Module):
    """Three 3x3 convolutions with strides 2, 1, 2, and the position.

    An image of shape (B, in_channels, H, W) becomes a map of shape
    (B, dim, ceil(H / 4), ceil(W / 4)).
    """

    def __init__(self, in_channels: int, dim: int, norm_cfg: dict) -> None:
        super().__init__()
        mid = dim // 2
        self.conv1 = nn.Conv2d(in_channels, mid, 3, stride=2, padding=1, bias=False)
        self.norm1 = build_norm_layer(norm_cfg, mid)[1]
        self.conv2 = nn.Conv2d(mid, mid, 3, stride=1, padding=1, bias=False)
        self.norm2 = build_norm_layer(norm_cfg, mid)[1]
        self.conv3 = nn.Conv2d(mid, dim, 3, stride=2, padding=1, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.pos = PixelAttention(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x)))
        x = self.act(self.norm2(self.conv2(x)))
        return self.pos(self.conv3(x))


class PatchEmbed(nn.Module):
    """Entry of stages 2 to 4: halves the map and adds the position.

    A map of shape (B, in_dim, H, W) becomes (B, dim, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, in_dim: int, dim: int, norm_cfg: dict) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1)
        self.norm = build_norm_layer(norm_cfg, dim)[1]
        self.pos = PixelAttention(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.pos(self.norm(self.conv(x)))


class EMSA(nn.Module):
    """Efficient multi-head self-attention (section 3.1).

    Keys and values come from a map that a depthwise convolution has reduced; the
    score maps of the heads interact and are normalised before they meet the
    values. With a single head there is neither interaction nor normalisation.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int = 1,  # reduction of the map that keys and values see
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
        self.sr_ratio = sr_ratio
        if sr_ratio > 1:
            self.sr = nn.Conv2d(
                dim, dim, sr_ratio + 1, sr_ratio, padding=sr_ratio // 2, groups=dim
            )
            self.sr_norm = nn.LayerNorm(dim)
        if num_heads > 1:
            self.transform_conv = nn.Conv2d(num_heads, num_heads, kernel_size=1)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        # B, N, C -> B, h, N, d
        q = self._split_heads(self.q(x))
        # B, M, C -> B, M, 2C -> twice B, h, M, d
        k, v = self.kv(self._reduce(x, size)).chunk(2, dim=-1)
        k, v = self._split_heads(k), self._split_heads(v)
        dropout_p = self.attn_drop if self.training else 0.0
        if self.num_heads == 1:
            x = attention(q, k, v, self.scale, dropout_p, self.attn_impl)
        else:
            x = head_interaction_attention(
                q,
                k,
                v,
                self.transform_conv.weight,
                self.transform_conv.bias,
                self.scale,
                dropout_p=dropout_p,
                attn_impl=self.attn_impl,
            )
        # B, h, N, d -> B, N, C
        x = x.transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(x))

    def _reduce(self, x: Tensor, size: Size) -> Tensor:
        if self.sr_ratio == 1:
            return x
        return self.sr_norm(to_tokens(self.sr(to_map(x, size))))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


class Mlp(nn.Module):
    """Linear, GELU, linear, on each token."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_mlp(x, self.fc1, self.fc2, self.drop)


class Block(nn.Module):
    """``x + EMSA(LN(x))``, then ``x + MLP(LN(x))`` (equations 7 and 8)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        attn_impl: str = 'auto',
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = EMSA(dim, num_heads, sr_ratio, qkv_bias, attn_drop, drop, attn_impl)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, size: Size) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x)))
