"""The archs of ResT as models of timm::

    import mmrest.timm, timm

    model = timm.create_model('rest_base', pretrained=True, num_classes=10)
    backbone = timm.create_model('restv2_tiny', features_only=True)

They take the options of ``timm.create_model``, such as ``num_classes``, ``in_chans``,
``drop_path_rate``, ``features_only`` and ``out_indices``, and those of
:class:`mmrest.ResT` and :class:`mmrest.ResTV2`, such as ``attn_impl``.
``pretrained=True`` loads ``pretrained/<name>.pth``, which ``python -m mmrest.weights``
downloads; ``pretrained='x.pdparams'`` loads any file that
:func:`mmrest.checkpoint.load_pretrained` can read.

The features are the maps of the stages as in the classifier. For the normalised maps of
the detectors, use ``type='ResT'``.
"""

from typing import Any, Callable, Union

from timm.layers import SelectAdaptivePool2d
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .checkpoint import load_pretrained
from .models import rest, restv2
from .models.base import BaseResT
from .models.utils import NUM_STAGES, to_map, to_tokens
from .weights import FOLDER, MODELS

NUM_CLASSES = 1000
Pretrained = Union[bool, str]


class _Classifier(BaseResT):
    """The interface that timm expects of a classifier."""

    _options: dict[str, Any] = {}

    def __init__(
        self,
        arch: Union[str, dict],
        num_classes: int = NUM_CLASSES,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(  # type: ignore[call-arg]
            arch,
            in_channels=in_chans,
            out_indices=(NUM_STAGES - 1,),
            drop_path_rate=drop_path_rate,
            **self._options,
            **options,
        )
        self.in_chans = in_chans
        self.feature_info = [
            dict(num_chs=dim, reduction=4 * 2**i, module=f'stage{i + 1}')
            for i, dim in enumerate(self.arch.embed_dims)
        ]
        self.num_features = self.head_hidden_size = self.arch.embed_dims[-1]
        self.head_drop = nn.Dropout(drop_rate)  # as in timm's own models
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the weights once; an outer model may call this again."""
        if not self._is_init:
            super().init_weights()
            self._is_init = True

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str = 'avg') -> None:
        self.num_classes = num_classes
        # some libraries ask for no pooling, and then need the map
        self.global_pool = SelectAdaptivePool2d(
            pool_type=global_pool, flatten=bool(global_pool)
        )
        self.head: nn.Module = nn.Identity()
        if num_classes:
            features = self.num_features * self.global_pool.feat_mult()
            self.head = nn.Linear(features, num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.with_cp = enable
        for i in range(self.num_stages):
            self.stage(i).with_cp = enable

    def load_pretrained(self, path: str) -> None:
        """Load a published file; a head with other classes keeps its weights."""
        head = self.head
        if self.num_classes != NUM_CLASSES:
            self.head = nn.Identity()
        other_head = () if self.num_classes == NUM_CLASSES else ('head',)
        load_pretrained(
            self,
            path,
            allow_missing=self.names_not_in_checkpoints(),
            allow_unexpected=other_head,
            adapt_input=True,
        )
        self.head = head

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The layer of a parameter, or its stage, as for MMEngine's optimizers."""
        depth = self.get_stage_depth if coarse else self.get_layer_depth
        return lambda name: depth(name)[0]

    def forward_features(self, x: Tensor) -> Tensor:
        # not the backbone's forward, which needs stage 4: it may have been pruned
        return self.forward_intermediates(x, 1, norm=True, intermediates_only=True)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Any:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Union[int, list[int], None] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Union[list[Tensor], tuple[Tensor, list[Tensor]]]:
        """Return the maps of the stages; ``norm`` normalises that of the last one."""
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', found {output_fmt!r}")
        wanted, last = feature_take_indices(self.num_stages, indices)
        x = self.prepare_image(x)
        maps = []
        for i in range(last + 1 if stop_early else self.num_stages):
            x = self.embed(i, x)
            size = (x.shape[2], x.shape[3])
            tokens = self.stage(i)(to_tokens(x), size)
            x = to_map(tokens, size)
            final = to_map(self.norm(tokens), size) if i == NUM_STAGES - 1 else x
            if i in wanted:
                maps.append((final if norm else x).contiguous())
        return maps if intermediates_only else (final, maps)

    def prune_intermediate_layers(
        self,
        indices: Union[int, list[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the layers that the requested maps do not need."""
        wanted, last = feature_take_indices(self.num_stages, indices)
        for i in range(last + 1, self.num_stages):
            delattr(self, self.embed_names[i])
            delattr(self, f'stage{i + 1}')
        self.num_stages = last + 1
        if prune_norm or self.num_stages < NUM_STAGES:
            self.norm: nn.Module = nn.Identity()
        if prune_head:
            self.reset_classifier(0, '')
        return wanted


class ResTClassifier(_Classifier, rest.ResT):
    """ResT as a classifier of timm."""


class ResTV2Classifier(_Classifier, restv2.ResTV2):
    """ResT v2 as a classifier of timm."""

    _options = dict(out_norm='final')


_KINDS = {'ResT': ResTClassifier, 'ResTV2': ResTV2Classifier}
_FIRST_CONV = {'ResT': 'stem.conv1', 'ResTV2': 'stem.proj.0'}


def _cfg(name: str) -> dict[str, Any]:
    size = 384 if name.endswith('_384') else 224
    return dict(
        file=f'{FOLDER}/{name}.pth',
        custom_load=True,
        num_classes=NUM_CLASSES,
        input_size=(3, size, size),
        pool_size=(size // 32, size // 32),
        crop_pct=1.0 if size == 384 else 0.9,
        interpolation='bicubic',
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        first_conv=_FIRST_CONV[MODELS[name].kind],
        classifier='head',
        license='apache-2.0',
        origin_url='https://github.com/wofmanaf/ResT',
    )


# timm's name of restv2_tiny_384 is restv2_tiny.in1k_384
default_cfgs = generate_default_cfgs(
    {'{}.in1k{}'.format(*name.partition('_384')): _cfg(name) for name in MODELS}
)


def _create(name: str, pretrained: Pretrained, **options: Any) -> nn.Module:
    if isinstance(pretrained, str):
        options['pretrained_cfg_overlay'] = dict(file=pretrained, custom_load=True)
    kind, arch = MODELS[name][:2]
    return build_model_with_cfg(
        _KINDS[kind],
        name,
        bool(pretrained),
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls='getter'),
        **{'arch': arch, **options},
    )


@register_model
def rest_lite(pretrained: Pretrained = False, **options: Any) -> nn.Module:
    """ResT-Lite."""
    return _create('rest_lite', pretrained, **options)


@register_model
def rest_small(pretrained: Pretrained = False, **options: Any) -> nn.Module:
    """ResT-Small."""
    return _create('rest_small', pretrained, **options)


@register_model
def rest_base(pretrained: Pretrained = False, **options: Any) -> nn.Module:
    """ResT-Base."""
    return _create('rest_base', pretrained, **options)


@register_model
def rest_large(pretrained: Pretrained = False, **options: Any) -> nn.Module:
    """ResT-Large."""
    return _create('rest_large', pretrained, **options)


@register_model
def restv2_tiny(pretrained: Pretrained = False, **options: Any) -> nn.Module:
    """ResTv2-Tiny."""
    return _create('restv2_tiny', pretrained, **options)


@register_model
def restv2_small(pretrained: Pretrained = False, **options: Any) -> nn.Module:
    """ResTv2-Small."""
    return _create('restv2_small', pretrained, **options)


@register_model
def restv2_base(pretrained: Pretrained = False, **options: Any) -> nn.Module:
    """ResTv2-Base."""
    return _create('restv2_base', pretrained, **options)


@register_model
def restv2_large(pretrained: Pretrained = False, **options: Any) -> nn.Module:
    """ResTv2-Large."""
    return _create('restv2_large', pretrained, **options)
