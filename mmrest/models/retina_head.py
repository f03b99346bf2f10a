"""Deprecated: :mod:`mmrest.models.clip_last_retina_head` under its first name."""

import warnings

from .clip_last_retina_head import ClipLastRetinaHead

__all__ = ['ClipLastRetinaHead']

warnings.warn(
    'mmrest.models.retina_head is deprecated. Import '
    'mmrest.models.clip_last_retina_head instead.',
    DeprecationWarning,
    stacklevel=2,
)
