"""A linear layer by oneDNN, whose weight is in oneDNN's own order, for CPUs.

In float32, PyTorch calls MKL for linear layers. MKL does not use AVX-512 on processors
that are not Intel's, and bias and GELU are passes of their own. oneDNN does everything
in one pass. To reorder the weight takes time, which many tokens make up for.

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

    Args:
        weight (Tensor): Of shape (out_features, in_features).
        bias (Tensor, optional): Of shape (out_features,).
        tokens (Tensor): All tokens of which x are parts, (N, C).
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

    def __call__(self, x: Tensor, out: Optional[Tensor] = None) -> Tensor:
        """Compute the result, into ``out`` if it is given."""
        if self.packed is not None:
            y = _onednn_linear(x, self.packed, self.bias, 'none')
        elif out is None or self.bias is None:
            y = F.linear(x, self.weight, self.bias)
        else:
            return torch.addmm(self.bias, x, self.weight.t(), out=out)
        return y if out is None else out.copy_(y)

    def gelu(self, x: Tensor) -> Tensor:
        """Compute the GELU (the exact one) of the result."""
        if self.packed is None:
            return F.gelu(F.linear(x, self.weight, self.bias))
        return _onednn_linear(x, self.packed, self.bias, 'gelu')


def _onednn_linear(
    x: Tensor, packed: Tensor, bias: Optional[Tensor], act: str
) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, act, [], 'none')


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
