"""What both generations of ResT offer to the toolboxes.

That is: the arguments in common, freezing, initial weights, which names a checkpoint
may lack, and the depth of parameters for learning-rate decay. The networks themselves
are in :mod:`.rest` and :mod:`.restv2`.
"""

from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoint.classifier import load_published_classifier
from ..checkpoint.load_from import check_parent_init
from ..checkpoint.loading import load_pretrained, pretrained_options
from ..ops import check_attn_impl
from ..ops.fast_path import is_transformed
from .utils import (
    NUM_STAGES,
    check_frozen_stages,
    check_out_indices,
    checkpoint_module,
    freeze,
    match_gradient_strides,
    merge_pretrained,
)

# Registered names of the two generations, and prefixes that only their checkpoints have
GENERATIONS = {
    'ResT': ('patch_embed_2.', 'stem.conv1.'),
    'ResTV2': ('patch_2.', 'stem.proj.0.'),
}


class BaseResT(BaseModule):
    """Base class of :class:`.rest.ResT` and :class:`.restv2.ResTV2`.

    A subclass builds an embedding and a :class:`.rest.Stage` for each stage, sets
    ``embed_names`` and ``out_norm_names``, and computes the outputs in ``forward``.

    Args:
        arch (Arch): Sizes of the stages.

    The other arguments are those of :class:`.rest.ResT`.
    """

    generation: str
    # attributes that hold the embedding and the output norm of each stage
    embed_names: tuple[str, ...]
    out_norm_names: tuple[str, ...]
    # MMPretrain's CAM tools ask for the number of class tokens and the like
    num_extra_tokens = 0

    def __init__(
        self,
        arch: Any,
        in_channels: int,
        out_indices: Sequence[int],
        frozen_stages: int,
        norm_eval: bool,
        with_cp: bool,
        attn_impl: str,
        pretrained: Optional[str],
        init_cfg: Union[dict, list, None],
    ) -> None:
        init_cfg = merge_pretrained(init_cfg, pretrained)
        pretrained_options(init_cfg)  # raises if init_cfg is malformed
        super().__init__(init_cfg=init_cfg)
        self.arch = arch
        self.in_channels = in_channels
        self.out_indices = check_out_indices(out_indices)
        self.frozen_stages = check_frozen_stages(frozen_stages)
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        self.attn_impl = check_attn_impl(attn_impl)
        self.num_stages = self.out_indices[-1] + 1

    def drop_path_rates(self, drop_path_rate: float) -> list[list[float]]:
        """Rates of the blocks, a list a stage, rising linearly from 0."""
        total = sum(self.arch.depths)
        rates = [drop_path_rate * j / max(1, total - 1) for j in range(total)]
        starts = [sum(self.arch.depths[:i]) for i in range(NUM_STAGES)]
        return [
            rates[start : start + depth]
            for start, depth in zip(starts, self.arch.depths)
        ]

    def embedding(self, i: int) -> nn.Module:
        """The stem or patch embedding of stage i + 1."""
        return getattr(self, self.embed_names[i])

    def stage(self, i: int) -> Any:
        """The blocks of stage i + 1."""
        return getattr(self, f'stage{i + 1}')

    def prepare_image(self, x: Tensor) -> Tensor:
        """Return images in channels_last order.

        Raises:
            ValueError: Unless they have shape (B, in_channels, H, W).
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f'{type(self).__name__} takes images of shape '
                f'(B, {self.in_channels}, H, W), found {tuple(x.shape)}'
            )
        if is_transformed():
            return x  # vmap does not support memory formats
        return x.contiguous(memory_format=torch.channels_last)

    def embed(self, i: int, x: Tensor) -> Tensor:
        """Apply the embedding of stage i + 1, checkpointed if ``with_cp`` is set."""
        embedding = self.embedding(i)
        return checkpoint_module(embedding, x) if self.with_cp else embedding(x)

    def train(self, mode: bool = True) -> 'BaseResT':
        """Set the mode, except of frozen parts and with ``norm_eval`` of BatchNorms."""
        super().train(mode)
        self.freeze_stages()
        match_gradient_strides(self)  # again after load_state_dict(assign=True)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        match_gradient_strides(self)  # copies and pickles lack the hooks

    def freeze_stages(self) -> None:
        """Freeze the stem and stages that ``frozen_stages`` selects."""
        if self.frozen_stages >= 0:
            freeze(self.embedding(0))
        for i in range(min(self.frozen_stages, self.num_stages)):
            freeze(self.embedding(i))
            freeze(self.stage(i))

    def init_weights(self) -> None:
        """Draw the weights, or load the checkpoint that ``init_cfg`` names."""
        if self.init_cfg is None:
            self._draw_weights()
            return
        options = pretrained_options(self.init_cfg)
        if options is None:
            super().init_weights()
            return
        self._draw_weights()  # for the parameters that a checkpoint lacks
        load_pretrained(self, **options, **self.allowed_differences())
        self._is_init = True

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        """Raise if the ``init_cfg`` of an outer model would load a part only."""
        check_parent_init(self, state_dict, prefix, **self.allowed_differences())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _checkpoint_filter(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        """Rename a published file for MMPretrain's ``ImageClassifier``, the caller."""
        load_published_classifier(
            self, state_dict, prefix, **self.allowed_differences()
        )

    def _draw_weights(self) -> None:
        """Truncated normal, std 0.02, for weights; linear biases 0; norms 1 and 0."""
        for module in self._modules_to_draw():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            norms = (nn.LayerNorm, nn.GroupNorm, _BatchNorm)
            if isinstance(module, norms) and module.weight is not None:
                nn.init.ones_(module.weight)
            if isinstance(module, (nn.Linear, *norms)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def _modules_to_draw(self) -> list[nn.Module]:
        """All but positional encodings of other packages, which draw their own."""
        foreign: set[nn.Module] = set()
        for i in range(self.num_stages):
            pos = getattr(self.embedding(i), 'pos', None)
            own = type(pos).__module__.startswith(('mmrest.', 'torch.nn.'))
            if isinstance(pos, nn.Module) and not own:
                foreign.update(pos.modules())
        return [module for module in self.modules() if module not in foreign]

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Return the layer of a parameter, for layer-wise learning-rate decay.

        The stem is layer 0, the blocks count from 1, and a patch embedding belongs to
        the block before it, as in MMPretrain's Swin. Output norms, and names that do
        not begin with ``prefix``, are in the last layer.

        Args:
            param_name (str): Name of the parameter.
            prefix (str): Prefix of the names of this backbone. Default: ''.

        Returns:
            tuple[int, int]: The layer and the number of layers.
        """
        depths = self.arch.depths[: self.num_stages]
        num_layers = sum(depths) + 2
        place = self._find_parameter(param_name, prefix)
        if place is None:
            return num_layers - 1, num_layers
        stage, block = place
        return sum(depths[:stage]) + block, num_layers

    def get_stage_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Return the stage of a parameter, for stage-wise learning-rate decay.

        The stem is 0, stage 1 is 1, and a patch embedding belongs to the stage before
        it. Arguments and result are those of :meth:`get_layer_depth`.
        """
        num_stages = self.num_stages + 2
        place = self._find_parameter(param_name, prefix)
        if place is None:
            return num_stages - 1, num_stages
        stage, block = place
        return stage + (block > 0), num_stages

    def _find_parameter(self, name: str, prefix: str) -> Optional[tuple[int, int]]:
        """The stage (from 0) and block (from 1; 0 is the embedding) of a parameter."""
        name = name[len(prefix) :] if name.startswith(prefix) else ''
        for i in range(self.num_stages):
            if name.startswith(f'{self.embed_names[i]}.'):
                return i, 0
            if name.startswith(f'stage{i + 1}.'):
                return i, int(name.split('.')[1]) + 1
        return None

    def explain_names(self, names: Sequence[str]) -> str:
        """Explain names in a checkpoint that are those of the other generation."""
        for kind, starts in GENERATIONS.items():
            if kind != self.generation and any(n.startswith(starts) for n in names):
                return (
                    f'The file is of {kind}, and the model is a {self.generation}: '
                    f"set type='{kind}' and one of its archs, or take a file of "
                    f'{self.generation}.'
                )
        return ''

    def names_not_in_checkpoints(self) -> tuple[str, ...]:
        """Modules that ImageNet checkpoints lack: all output norms but ``norm``."""
        names = (self.out_norm_names[i] for i in self.out_indices)
        return tuple(name for name in names if name != 'norm')

    def names_only_in_checkpoints(self) -> tuple[str, ...]:
        """Modules that this model lacks and a checkpoint of its arch may hold."""
        names = ['head']
        for i in range(NUM_STAGES):
            if i not in self.out_indices:
                names.append(self.out_norm_names[i])
            if i >= self.num_stages:
                names += [self.embed_names[i], f'stage{i + 1}']
        return tuple(names)

    def allowed_differences(self) -> dict[str, tuple[str, ...]]:
        """Differences between model and checkpoint that loading accepts."""
        return dict(
            allow_missing=self.names_not_in_checkpoints(),
            allow_unexpected=self.names_only_in_checkpoints(),
        )
