"""Subjects of the benchmark: ResT, backbones of MMDetection, a matrix product."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple, Optional

import torch
from torch import nn

Shape = tuple[int, int]

# The backbones of these configs of MMDetection, with random weights.
PEERS = {
    'PVT-Tiny': 'pvt/retinanet_pvt-t_fpn_1x_coco.py',
    'PVT-Small': 'pvt/retinanet_pvt-s_fpn_1x_coco.py',
    'Swin-T': 'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    'Swin-S': 'swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py',
    'ResNet-50': 'retinanet/retinanet_r50_fpn_1x_coco.py',
    'ResNet-101': 'retinanet/retinanet_r101_fpn_1x_coco.py',
}


def rest_of(arch: str) -> tuple[str, str]:
    """Return the class and its arch for names such as ``'v2-tiny'``."""
    start, _, end = arch.rpartition('-')
    return ('ResTV2' if start == 'v2' else 'ResT'), end


@dataclass(frozen=True)
class Subject:
    """A row of the table.

    Attributes:
        name (str): Name in the table, without the dtype.
        dtype (str): 'float32', or the type of autocast (for a product, of the
            matrices).
        arch (str, optional): Arch of a ResT, with the three fields below; of a ResTV2
            after ``'v2-'``.
        attn_impl (str): As in :class:`mmrest.ResT`.
        with_cp (bool): As in :class:`mmrest.ResT`.
        compile (bool): Whether to use ``torch.compile``.
        peer (str, optional): A key of ``PEERS``.
        matmul (int): Side of square matrices to multiply.
    """

    name: str
    dtype: str = 'float32'
    arch: Optional[str] = None
    attn_impl: str = 'auto'
    with_cp: bool = False
    compile: bool = False
    peer: Optional[str] = None
    matmul: int = 0

    def macs(self, shape: Shape) -> Optional[int]:
        """Multiply-accumulates of an image's forward pass, if known."""
        if self.matmul:
            return self.matmul**3
        return sum(rest_macs(self.arch, shape)) if self.arch else None


class Macs(NamedTuple):
    """Multiply-accumulates, by how they grow with the area A of the image."""

    linear: int  # convolutions and linear layers: proportional to A
    quadratic: int  # products of queries, keys, values and heads: proportional to A^2


def rest_macs(arch: str, shape: Shape) -> Macs:
    """Count ResT's forward pass of one image, without output norms.

    The products of the attention are counted by its definition. With a map of N x M
    entries for each of h heads, q k^T and the product with v take N M C each, and the
    1x1 convolution over the heads takes h^2 N M.

    Args:
        arch (str): As in :class:`Subject`.
        shape (tuple[int, int]): Height and width of the image.
    """
    from mmrest.models import rest, restv2

    model, arch = rest_of(arch)
    sizes = (rest if model == 'ResT' else restv2).ARCHS[arch]
    height, width = (ceil(side / 2) for side in shape)
    dim = sizes.embed_dims[0]
    mid = dim // 2
    # the first convolutions of the stem; the last one is counted with stage 1
    linear = height * width * 9 * 3 * mid
    if model == 'ResT':
        linear += height * width * 9 * mid * mid
    else:
        linear += ceil(height / 2) * ceil(width / 2) * dim * dim
    quadratic = 0
    dims_in = (mid, *sizes.embed_dims)
    stages = zip(dims_in, *sizes)
    for dim_in, dim, heads, depth, reduction, mlp_ratio in stages:
        height, width = ceil(height / 2), ceil(width / 2)
        queries = height * width
        keys = ceil(height / reduction) * ceil(width / reduction)
        linear += queries * 9 * (dim_in * dim + dim)
        reduce = keys * (reduction + 1) ** 2 * dim if reduction > 1 else 0
        projections = 2 * (queries + keys) * dim**2
        mlp = 2 * queries * dim * int(dim * mlp_ratio)
        upsample = keys * 9 * dim * reduction**2 if model == 'ResTV2' else 0
        linear += depth * (reduce + projections + mlp + upsample)
        mixing = heads**2 if heads > 1 and model == 'ResT' else 0
        quadratic += depth * queries * keys * (2 * dim + mixing)
    return Macs(linear, quadratic)


def list_subjects(
    archs: list[str],
    dtypes: list[str],
    with_cp: bool = False,
    compile: bool = False,
    peers: bool = False,
    matmul: int = 0,
    device: str = 'cpu',
) -> list[Subject]:
    """Return the rows for the options of the command line."""
    return [
        subject
        for dtype in dtypes
        for subject in _of_one_dtype(
            archs, dtype, with_cp, compile, peers, matmul, device
        )
    ]


def _of_one_dtype(
    archs: list[str],
    dtype: str,
    with_cp: bool,
    compile: bool,
    peers: bool,
    matmul: int,
    device: str,
) -> Iterator[Subject]:
    from mmrest.ops import amx_head_interaction, triton_head_interaction

    for arch in archs:
        name = f'ResT{arch}' if arch.startswith('v2') else f'ResT-{arch}'
        impls = ['dense', 'auto']
        # the second generation mixes no heads
        if name.startswith('ResT-'):
            if device.startswith('cuda') and triton_head_interaction.is_available():
                impls[1:] = ['tiled', 'triton']
            is_amx_type = device == 'cpu' and dtype == 'bfloat16'
            if is_amx_type and amx_head_interaction.is_available():
                impls.append('amx')
        for impl in impls:
            yield Subject(f'{name} {impl}', dtype, arch, attn_impl=impl)
        if with_cp:
            yield Subject(f'{name} auto, with_cp', dtype, arch, with_cp=True)
        if compile:
            yield Subject(f'{name} auto, compiled', dtype, arch, compile=True)
    if peers:
        for name in PEERS:
            yield Subject(name, dtype, peer=name)
    if matmul:
        yield Subject(f'{matmul}x{matmul} product', dtype, matmul=matmul)


def build_model(subject: Subject) -> nn.Module:
    """Build the backbone of a subject, with random weights."""
    torch.manual_seed(0)
    if subject.arch:
        import mmrest

        kind, arch = rest_of(subject.arch)
        model = getattr(mmrest, kind)(
            arch=arch, attn_impl=subject.attn_impl, with_cp=subject.with_cp
        )
    else:
        model = _build_peer(PEERS[subject.peer])
    _init_quietly(model)
    return model


def _init_quietly(model: nn.Module) -> None:
    """Draw the weights without MMEngine's log of each of them."""
    from mmengine.logging import MMLogger

    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.ERROR)
    model.init_weights()
    logger.setLevel(level)


def _build_peer(config: str) -> nn.Module:
    from mmdet.registry import MODELS
    from mmengine.hub import get_config
    from mmengine.registry import init_default_scope

    init_default_scope('mmdet')
    cfg = get_config(f'mmdet::{config}').model.backbone
    cfg.pop('init_cfg', None)
    if cfg.type == 'ResNet':
        # the other backbones train all of their layers
        cfg.update(frozen_stages=-1, norm_eval=False)
    return MODELS.build(cfg)
