"""Whether a run can write into its folders."""

from collections.abc import Iterator
from typing import Any

from ...utils.disk import explain_unwritable


def check_folders(cfg: Any) -> Iterator[str]:
    """Write a small file into the work folder and the folder of the checkpoints."""
    checkpoint = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    for name, folder in (
        ('--work-dir', cfg.get('work_dir')),
        ('default_hooks.checkpoint.out_dir', checkpoint.get('out_dir')),
    ):
        problem = explain_unwritable(str(folder)) if folder else None
        if problem:
            yield (
                f'{name}: {problem} Make room or make it writable, or choose another '
                f'folder with {name}.'
            )
