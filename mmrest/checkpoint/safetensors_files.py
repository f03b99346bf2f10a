"""Checkpoints in the format of safetensors; the library is optional.

The format holds tensors and text only. The ``meta`` of a checkpoint is kept as JSON in
the text.
"""

import json
import os
from types import ModuleType
from typing import Any, Union

import torch

_META = 'mmrest_meta'


def is_safetensors(path: str) -> bool:
    """Whether a file is of this format, by its first bytes."""
    with open(path, 'rb') as file:
        head = file.read(9)
    # the length of a JSON header, and the header
    length = int.from_bytes(head[:8], 'little')
    return head[8:] == b'{' and length <= os.path.getsize(path) - 8


def read_safetensors(
    path: str, device: Union[str, torch.device] = 'cpu'
) -> dict[str, dict]:
    """Read the tensors of a file as ``state_dict``, and ``meta``.

    ``meta`` is empty if the file was not written by :func:`safetensors_bytes`.

    Raises:
        ImportError: If safetensors is not installed.
    """
    with _library().safe_open(path, framework='pt', device=str(device)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        meta = json.loads((file.metadata() or {}).get(_META, '{}'))
    return dict(state_dict=tensors, meta=meta)


def safetensors_bytes(
    state_dict: dict[str, torch.Tensor], meta: dict[str, Any]
) -> tuple[bytes, list[str]]:
    """Return the content of a file, and the keys of ``meta`` that JSON cannot hold.

    Raises:
        ImportError: If safetensors is not installed.
    """
    _library()
    from safetensors.torch import save

    kept, left_out = {}, []
    for key, value in meta.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            left_out.append(str(key))
        else:
            kept[key] = value
    # a copy of each: the format refuses tensors that share their memory
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in state_dict.items()}
    content = save(tensors, {'format': 'pt', _META: json.dumps(kept)})
    return _with_ordered_metadata(content), left_out


def _with_ordered_metadata(content: bytes) -> bytes:
    """Sort the metadata, so that equal files have equal hashes."""
    end = 8 + int.from_bytes(content[:8], 'little')
    header = json.loads(content[8:end])
    header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)  # the tensors are aligned
    return len(text).to_bytes(8, 'little') + text + content[end:]


def _library() -> ModuleType:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            'files of this format need the package safetensors, which is not '
            'installed: pip install safetensors'
        ) from error
    return safetensors
