"""The layers of ResT that all its variants share.

Between layers, features are tokens of shape (B, H * W, C). The same memory seen
as a map of shape (B, C, H, W) is in channels_last order, so going from one to the
other (:func:`to_map`, :func:`to_tokens`) copies nothing.
"""

from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn

from ..ops import gelu_mlp

Size = tuple[int, int]


def to_map(x: Tensor, size: Size) -> Tensor:
    """Tokens (B, H * W, C) as a map (B, C, H, W)."""
    return x.unflatten(1, size).permute(0, 3, 1, 2)


def to_tokens(x: Tensor) -> Tensor:
    """A map (B, C, H, W) as tokens (B, H * W, C)."""
    # a map in another memory format than channels_last is copied here
    return x.permute(0, 2, 3, 1).flatten(1, 2)


class PatchEmbed(nn.Module):
    """Entry of stages 2 to 4: halves the map and encodes the position.

    A map of shape (B, in_dim, H, W) becomes (B, dim, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, in_dim: int, dim: int, norm_cfg: dict, pos: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1)
        self.norm = build_norm_layer(norm_cfg, dim)[1]
        self.pos = pos

    def forward(self, x: Tensor) -> Tensor:
        return self.pos(self.norm(self.conv(x)))


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
    """``x + attn(LN(x))``, then ``x + MLP(LN(x))`` (equations 7 and 8)."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, size: Size) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x)))
