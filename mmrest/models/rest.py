"""ResT, an efficient multi-scale vision Transformer (arXiv:2105.13677)."""

from collections.abc import Sequence
from functools import partial
from numbers import Integral
from typing import Any, Optional, Union

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..checkpoint import load_pretrained
from ..ops.attention import check_attn_impl
from .arch import NUM_STAGES, resolve_arch
from .batch_statistics import has_live_statistics, keep_statistics_when_repeated
from .layers import Block, PatchEmbed, to_map, to_tokens
from .parts import (
    ATTENTIONS,
    STEMS,
    PartCfg,
    build_part,
    build_position,
    is_own_position,
)

_NORMS = (nn.LayerNorm, nn.GroupNorm, _BatchNorm)


@MODELS.register_module()
class ResT(BaseModule):
    """ResT backbone.

    The parameters have the names of the published ImageNet checkpoints.

    Args:
        arch (str | dict): ``'lite'``, ``'small'``, ``'base'``, ``'large'``, or a
            dict with ``embed_dims``, ``num_heads``, ``depths``, ``sr_ratios`` (four
            integers each) and ``mlp_ratios`` (four numbers or one, default 4).
            Default: ``'small'``.
        in_channels (int): Channels of the image. Default: 3.
        out_indices (Sequence[int]): Stages whose maps are returned, ascending;
            0 to 3 stand for stages 1 to 4. Later stages are not built.
            Default: (0, 1, 2, 3).
        qkv_bias (bool): Whether queries, keys and values have a bias.
            Default: True.
        drop_rate (float): Dropout after the attention's projection and in the
            MLP. Default: 0.
        attn_drop_rate (float): Dropout on the attention maps. Default: 0.
        drop_path_rate (float): Stochastic depth of the last block; it rises
            linearly from 0 at the first. Default: 0.
        frozen_stages (int): -1 freezes nothing, 0 the stem, k the stem and stages
            1 to k with their patch embeddings: no gradients, norms in evaluation
            mode. The norms of the outputs, which no ImageNet checkpoint has
            trained for stages 1 to 3, stay trainable. Default: -1.
        norm_eval (bool): Whether all BatchNorms stay in evaluation mode.
            Default: False.
        with_cp (bool): Whether the activations of stem, patch embeddings and blocks
            are computed again in the backward pass instead of being stored. The
            statistics of BatchNorms are updated once all the same. Default: False.
        norm_cfg (dict): The norms of stem and patch embeddings.
            Default: ``dict(type='BN')``.
        out_norm (str): ``'chain'``, as in the published detectors: the normalised
            map of a requested stage is also what the next stage receives.
            ``'branch'`` normalises the output alone. Default: ``'chain'``.
        attn_impl (str): ``'auto'``, ``'tiled'`` or ``'dense'``, see
            :func:`mmrest.ops.head_interaction_attention`. Default: ``'auto'``.
        stem_cfg (str | dict): ``'rest'``, ``'resnet'`` or ``'patch'``, alone or as
            ``type`` of a dict with options, as the next two; see
            :mod:`mmrest.models.stems`. Default: ``'rest'``.
        pos_cfg (str | dict): The positional encoding of every stage: ``'pa'``,
            ``'gl'``, ``'le'``, ``'none'``, see :mod:`mmrest.models.positions`, or
            any registered module that maps a map to one of the same shape.
            Default: ``'pa'``.
        attn_cfg (str | dict): ``'emsa'``, ``'emsa_without_norm'``,
            ``'emsa_without_both'`` or ``'msa'``, see
            :mod:`mmrest.models.attentions`. Default: ``'emsa'``.
        init_cfg (dict, optional): ``dict(type='Pretrained', checkpoint=...)``
            reads a published or own checkpoint, see
            :func:`mmrest.checkpoint.load_pretrained`. Without it, weights are
            drawn as published: truncated normal with standard deviation 0.02.

    Raises:
        ValueError: If an argument is not one of those described.

    Example:
        >>> import torch
        >>> from mmrest import ResT
        >>> model = ResT(arch='lite').eval()
        >>> with torch.no_grad():
        ...     outs = model(torch.rand(1, 3, 250, 333))
        >>> [tuple(out.shape) for out in outs]
        [(1, 64, 63, 84), (1, 128, 32, 42), (1, 256, 16, 21), (1, 512, 8, 11)]
    """

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
        init_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        self.arch = resolve_arch(arch)
        self.in_channels = in_channels
        self.out_indices = _check_out_indices(out_indices)
        self.frozen_stages = _check_frozen_stages(frozen_stages)
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        if out_norm not in ('chain', 'branch'):
            raise ValueError(
                f"out_norm must be 'chain' or 'branch', found {out_norm!r}"
            )
        self.out_norm = out_norm
        check_attn_impl(attn_impl)

        dims, depths = self.arch.embed_dims, self.arch.depths
        num_blocks = sum(depths)
        drop_paths = [
            drop_path_rate * j / max(1, num_blocks - 1) for j in range(num_blocks)
        ]
        self.num_stages = self.out_indices[-1] + 1
        for i in range(self.num_stages):
            pos = build_position(pos_cfg, dims[i], map_stride=4 * 2**i)
            if i == 0:
                self.stem = build_part(
                    STEMS,
                    'stem_cfg',
                    stem_cfg,
                    in_channels=in_channels,
                    dim=dims[0],
                    norm_cfg=norm_cfg,
                    pos=pos,
                )
            else:
                patch_embed = PatchEmbed(dims[i - 1], dims[i], norm_cfg, pos)
                self.add_module(f'patch_embed_{i + 1}', patch_embed)
            first = sum(depths[:i])
            blocks = nn.ModuleList(
                Block(
                    dim=dims[i],
                    attn=build_part(
                        ATTENTIONS,
                        'attn_cfg',
                        attn_cfg,
                        dim=dims[i],
                        num_heads=self.arch.num_heads[i],
                        sr_ratio=self.arch.sr_ratios[i],
                        qkv_bias=qkv_bias,
                        attn_drop=attn_drop_rate,
                        proj_drop=drop_rate,
                        attn_impl=attn_impl,
                    ),
                    mlp_ratio=self.arch.mlp_ratios[i],
                    drop=drop_rate,
                    drop_path=drop_paths[first + j],
                )
                for j in range(depths[i])
            )
            self.add_module(f'stage{i + 1}', blocks)
        for i in self.out_indices:
            self.add_module(self._out_norm_name(i), nn.LayerNorm(dims[i]))

        self._freeze_stages()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps of the requested stages.

        Args:
            x (Tensor): Images, of shape (B, in_channels, H, W), of any size.

        Returns:
            tuple[Tensor, ...]: For each of ``out_indices`` a map of shape
            (B, C_i, ceil(H / 4 / 2**i), ceil(W / 4 / 2**i)), contiguous.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f'ResT takes images of shape (B, {self.in_channels}, H, W), '
                f'found {tuple(x.shape)}'
            )
        x = x.contiguous(memory_format=torch.channels_last)
        outs = []
        for i in range(self.num_stages):
            x = self._run(self._entry(i), x)
            size = (x.shape[2], x.shape[3])
            # B, C, H, W -> B, N, C
            x = to_tokens(x)
            for block in self._blocks(i):
                x = self._run(block, x, size)
            if i in self.out_indices:
                out = getattr(self, self._out_norm_name(i))(x)
                if self.out_norm == 'chain':
                    x = out
                # contiguous: mmcv's RoIAlign reads channels_last maps of a CPU wrongly
                outs.append(to_map(out, size).contiguous())
            x = to_map(x, size)
        return tuple(outs)

    def init_weights(self) -> None:
        """Read the checkpoint that ``init_cfg`` names, or draw the weights."""
        if self.init_cfg is None:
            self._draw_weights()
            return
        pretrained = self._pretrained_cfg()
        if pretrained is None:
            super().init_weights()
            return
        # what a checkpoint lacks (norm1..3) is drawn
        self._draw_weights()
        load_pretrained(
            self,
            pretrained['checkpoint'],
            may_be_new=self._may_be_new(),
            may_be_unused=self._may_be_unused(),
            prefix=pretrained.get('prefix'),
        )
        self._is_init = True

    def train(self, mode: bool = True) -> 'ResT':
        """Set the mode; frozen parts and ``norm_eval`` norms stay as they are."""
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Say how deep a parameter lies, for layer-wise learning-rate decay.

        The stem is layer 0, the blocks count from 1 on, and the entry of a stage
        belongs to the block before it, as in mmpretrain's Swin. The norms of the
        outputs and all that does not begin with ``prefix`` are the last layer.

        Args:
            param_name (str): Name of the parameter.
            prefix (str): What the names of this backbone begin with. Default: ''.

        Returns:
            tuple[int, int]: The layer and the number of layers.
        """
        depths = self.arch.depths[: self.num_stages]
        num_layers = sum(depths) + 2
        name = param_name[len(prefix) :] if param_name.startswith(prefix) else ''
        if name.startswith('stem.'):
            return 0, num_layers
        for i in range(self.num_stages):
            if name.startswith(f'patch_embed_{i + 1}.'):
                return sum(depths[:i]), num_layers
            if name.startswith(f'stage{i + 1}.'):
                return sum(depths[:i]) + int(name.split('.')[1]) + 1, num_layers
        return num_layers - 1, num_layers

    def _run(self, module: nn.Module, *args: Any) -> Tensor:
        """Call a module, with ``with_cp`` so that it stores its inputs alone."""
        if not self.with_cp or not torch.is_grad_enabled():
            return module(*args)
        options = {}
        if has_live_statistics(module):
            if torch.compiler.is_compiling():  # which knows no context_fn
                return module(*args)
            options['context_fn'] = partial(keep_statistics_when_repeated, module)
        return checkpoint(module, *args, use_reentrant=False, **options)

    def _freeze_stages(self) -> None:
        if self.frozen_stages >= 0:
            _freeze(self.stem)
        for i in range(min(self.frozen_stages, self.num_stages)):
            _freeze(self._entry(i))
            _freeze(self._blocks(i))

    def _entry(self, i: int) -> nn.Module:
        return self.stem if i == 0 else getattr(self, f'patch_embed_{i + 1}')

    def _blocks(self, i: int) -> nn.ModuleList:
        return getattr(self, f'stage{i + 1}')

    @staticmethod
    def _out_norm_name(i: int) -> str:
        # the classifier's final norm serves stage 4
        return 'norm' if i == NUM_STAGES - 1 else f'norm{i + 1}'

    def _draw_weights(self) -> None:
        for module in self._modules_to_draw():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, _NORMS) and module.weight is not None:
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def _modules_to_draw(self) -> list[nn.Module]:
        """All but foreign positional encodings, which have drawn their own."""
        entries = [self._entry(i) for i in range(self.num_stages)]
        encodings = [entry.pos for entry in entries if hasattr(entry, 'pos')]
        foreign = {m for e in encodings if not is_own_position(e) for m in e.modules()}
        return [module for module in self.modules() if module not in foreign]

    def _pretrained_cfg(self) -> Optional[dict]:
        """``init_cfg`` if it names a checkpoint and nothing else."""
        cfgs = self.init_cfg if isinstance(self.init_cfg, list) else [self.init_cfg]
        if len(cfgs) == 1 and cfgs[0].get('type') == 'Pretrained':
            return cfgs[0]
        return None

    def _may_be_new(self) -> tuple[str, ...]:
        """Modules that ImageNet checkpoints do not hold."""
        indices = [i for i in self.out_indices if i < NUM_STAGES - 1]
        return tuple(self._out_norm_name(i) for i in indices)

    def _may_be_unused(self) -> tuple[str, ...]:
        """Modules that a checkpoint of this arch may hold and this model lacks."""
        absent = {'head'}
        for i in range(NUM_STAGES):
            if i not in self.out_indices:
                absent.add(self._out_norm_name(i))
            if i >= self.num_stages:
                absent.update((f'patch_embed_{i + 1}', f'stage{i + 1}'))
        return tuple(sorted(absent))


def _freeze(module: nn.Module) -> None:
    module.eval()
    for param in module.parameters():
        param.requires_grad = False


def _check_out_indices(out_indices: Sequence[int]) -> tuple[int, ...]:
    indices = tuple(out_indices) if isinstance(out_indices, (list, tuple)) else ()
    in_range = all(_is_int(i) and 0 <= i < NUM_STAGES for i in indices)
    if not indices or not in_range or list(indices) != sorted(set(indices)):
        raise ValueError(
            f'out_indices must be ascending stage indices from 0 to {NUM_STAGES - 1} '
            f'(at least one), found {out_indices!r}'
        )
    return indices


def _check_frozen_stages(frozen_stages: int) -> int:
    if not _is_int(frozen_stages) or not -1 <= frozen_stages <= NUM_STAGES:
        raise ValueError(
            'frozen_stages must be an integer from -1 (nothing) over 0 (stem) to '
            f'{NUM_STAGES} (everything but the output norms), found {frozen_stages!r}'
        )
    return frozen_stages


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
