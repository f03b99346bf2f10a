"""The definition of ResT's attention, with every map stored.

These functions follow the paper's equations operation by operation. They are
the reference that every other implementation is tested against, and the form
that TorchScript and ONNX can export.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_head_interaction_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    scale: float,
    eps: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """``Dropout(InstanceNorm(softmax(Conv1x1(scale * q k^T)))) v``.

    Section 3.1, equation 4 of the paper. Arguments and result as in
    :func:`mmrest.ops.head_interaction_attention`.
    """
    heads = q.shape[1]
    # B, h, N, M
    attn = (q @ k.transpose(-2, -1)) * scale
    attn = F.conv2d(attn, weight.reshape(heads, heads, 1, 1), bias)
    attn = attn.softmax(dim=-1)
    # torch.instance_norm, unlike its nn.functional twin, takes 1x1 maps
    attn = torch.instance_norm(
        attn, None, None, None, None, True, 0.0, eps, torch.backends.cudnn.enabled
    )
    if dropout_p > 0.0:
        attn = F.dropout(attn, dropout_p)
    # B, h, N, d
    return attn.to(v.dtype) @ v


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """``Dropout(softmax(scale * q k^T)) v``, the attention of one head."""
    attn = (q @ k.transpose(-2, -1)) * scale
    attn = attn.softmax(dim=-1)
    if dropout_p > 0.0:
        attn = F.dropout(attn, dropout_p)
    return attn.to(v.dtype) @ v
