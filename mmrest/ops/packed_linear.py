"""A linear layer and its GELU by oneDNN, with the weight in oneDNN's order, for CPUs.

In float32, PyTorch calls MKL for linear layers. MKL does not use AVX-512 on processors
of AMD, and bias and GELU are passes of their own. oneDNN does everything in one pass.
To reorder the weight takes time, which many tokens make up for.

PyTorch has the operators for Inductor's frozen models. They have no gradient.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

# With fewer tokens, or fewer values in them, reordering takes as long as it saves
MIN_TOKENS = {torch.float32: 1024, torch.bfloat16: 2048}
MIN_VALUES = 2**19


class PackedLinear:
    """``x @ weight.t() + bias``, for several x.

    It is PyTorch's linear layer where gradients are recorded, and where oneDNN is not
    faster: on other devices, for other types, without AVX-512, and for few tokens.

    It is not for the second layer of an MLP: oneDNN adds the products of a sum one
    after the other, and MKL by blocks, which is twice as exact at 1,536 channels.

    Args:
        weight (Tensor): Of shape (out_features, in_features).
        bias (Tensor, optional): Of shape (out_features,).
        tokens (Tensor): All tokens of which x are parts, (N, in_features).
        rows (int): Tokens in one x, at most.
    """

    def __init__(
        self, weight: Tensor, bias: Optional[Tensor], tokens: Tensor, rows: int
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.packed: Optional[Tensor] = None
        if _is_faster(tokens):
            rows = min(rows, len(tokens))
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return self._by_onednn(x, 'none')

    def gelu(self, x: Tensor) -> Tensor:
        """Compute the GELU (the exact one) of the result."""
        if self.packed is None:
            return F.gelu(F.linear(x, self.weight, self.bias))
        return self._by_onednn(x, 'gelu')

    def _by_onednn(self, x: Tensor, act: str) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(
            x, self.packed, self.bias, act, [], 'none'
        )


def _is_faster(tokens: Tensor) -> bool:
    return (
        tokens.device.type == 'cpu'
        and not torch.is_grad_enabled()
        and tokens.dtype in MIN_TOKENS
        and len(tokens) >= MIN_TOKENS[tokens.dtype]
        and tokens.numel() >= MIN_VALUES
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and torch.backends.cpu.get_cpu_capability() == 'AVX512'
        and hasattr(torch.ops.mkldnn, '_reorder_linear_weight')
        and hasattr(torch.ops.mkldnn, '_linear_pointwise')
    )
