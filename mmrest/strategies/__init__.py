"""Strategies of MMEngine's FlexibleRunner, in its root registry."""

from .fsdp import BlockFSDPStrategy, rest_block_wrap_policy

__all__ = ['BlockFSDPStrategy', 'rest_block_wrap_policy']
