"""Preprocessing of images, within the exported program."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExportError(ValueError):
    """A model that cannot be exported as requested."""


def require(condition: bool, place: str, wanted: str, found: Any) -> None:
    """Raise an ExportError unless a part of the model is supported."""
    if not condition:
        name = found if isinstance(found, (str, dict)) else type(found).__name__
        raise ExportError(
            f'model.{place} must be {wanted} to be exported, found {name}'
        )


def side_of(size: Tensor, index: int) -> Any:
    """Return a height or width that is only known when the program runs."""
    side = size[index].item()
    torch._check(side >= 1)
    return side


class Preprocess(nn.Module):
    """Normalise and pad images (B, H, W, 3), RGB, uint8, to (B, 3, H', W').

    Args:
        mean (Tensor): Mean of each channel.
        std (Tensor): Standard deviation of each channel.
        to_bgr (bool): Whether the network takes BGR images.
        divisor (int): H' and W' are multiples of it. Default: 1.
        pad_value (float): Value of the padding after the normalisation. Default: 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Tensor,
        std: Tensor,
        to_bgr: bool,
        divisor: int = 1,
        pad_value: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_buffer('mean', mean.clone().reshape(3, 1, 1))
        self.register_buffer('std', std.clone().reshape(3, 1, 1))
        self.to_bgr, self.divisor, self.pad_value = to_bgr, divisor, pad_value

    @classmethod
    def of(
        cls, given: Any, to_bgr: bool, divisor: int, pad_value: float
    ) -> 'Preprocess':
        """Use the mean and standard deviation of a toolbox's preprocessor."""
        if given._enable_normalize:
            mean, std = given.mean, given.std
        else:
            mean, std = torch.zeros(3), torch.ones(3)
        require(
            mean.numel() == 3, 'data_preprocessor', 'for images of 3 channels', given
        )
        return cls(mean, std, to_bgr, divisor, float(pad_value))

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[1], images.shape[2]
        x = images.permute(0, 3, 1, 2)
        if self.to_bgr:
            x = x.flip(1)
        x = (x.float() - self.mean) / self.std
        below, right = -height % self.divisor, -width % self.divisor
        return F.pad(x, (0, right, 0, below), value=self.pad_value)

    def describe(self) -> dict[str, Any]:
        """Return the arguments, for the metadata of a file."""
        return dict(
            mean=self.mean.flatten().tolist(),
            std=self.std.flatten().tolist(),
            channel_order='BGR' if self.to_bgr else 'RGB',
            pad_size_divisor=self.divisor,
            pad_value=self.pad_value,
        )
