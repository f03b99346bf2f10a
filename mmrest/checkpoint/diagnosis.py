"""What a file that cannot be loaded is instead, judged by its first bytes."""

import os
import zipfile
from typing import Optional

HEAD_SIZE = 512

PAGE_ADVICE = (
    'The server answered with a page (a login, a confirmation, an error) instead of '
    'the file. Download the file in a browser and name it by its path.'
)
DAMAGED_ADVICE = 'Copy or download it again and compare its size with the source.'

# first bytes, what begins so, what to do
KINDS = (
    (b'<', 'an HTML or XML page', PAGE_ADVICE),
    (
        b'version https://git-lfs',
        'a Git LFS pointer, which stands for the file',
        'Run `git lfs pull` in the repository that it comes from.',
    ),
    (b'\xff\xd8\xff', 'a JPEG image', ''),
    (b'\x89PNG', 'a PNG image', ''),
    (b'%PDF', 'a PDF document', ''),
    (b'\x1f\x8b', 'a gzip archive', 'Unpack it and name the checkpoint inside.'),
    (b'7z\xbc\xaf', 'a 7-Zip archive', 'Unpack it and name the checkpoint inside.'),
    (b'Rar!', 'a RAR archive', 'Unpack it and name the checkpoint inside.'),
    (b'\x89HDF', 'an HDF5 file', ''),
    (b'{', 'a JSON file', ''),
    (b'[', 'a JSON file', ''),
)
NAME_ADVICE = 'Name a checkpoint that torch.save wrote.'


def read_head(path: str) -> bytes:
    """Read the first bytes of a file."""
    with open(path, 'rb') as file:
        return file.read(HEAD_SIZE)


def foreign_kind(path: str) -> Optional[str]:
    """Name what a file is if it is nothing that ``torch.load`` may be given.

    TorchScript archives and the tar format of PyTorch before 0.4 are among
    these: they hold code, or cannot be read safely.

    Args:
        path (str): A file.

    Returns:
        str | None: Two sentences, what it is and what to do, or None if it may
        be a checkpoint.
    """
    head = read_head(path)
    if not head:
        return f'The file is empty (0 bytes). {DAMAGED_ADVICE}'
    if not head.strip(b'\0'):
        return (
            f'The file begins with {len(head)} zero bytes, as after an interrupted '
            f'copy. {DAMAGED_ADVICE}'
        )
    text = head.lstrip(b'\xef\xbb\xbf \t\r\n')
    for start, kind, advice in KINDS:
        if text.startswith(start):
            return _found(path, f'It is {kind}', advice or NAME_ADVICE)
    if head[257:262] == b'ustar':
        return _found(
            path,
            'It is a tar archive, perhaps a checkpoint of PyTorch before 0.4',
            'Unpack it, or load and save it again with PyTorch 1.x.',
        )
    if head.startswith(b'PK') and zipfile.is_zipfile(path):
        return _foreign_zip(path)
    return None


def _foreign_zip(path: str) -> Optional[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.rsplit('/', 1)[-1] for name in archive.namelist()]
    except zipfile.BadZipFile as error:
        return _found(path, f'It is a damaged zip archive ({error})', DAMAGED_ADVICE)
    if 'constants.pkl' in names:
        return _found(
            path,
            'It is a TorchScript archive, which holds code',
            'Save the state dict of the model that it was made from.',
        )
    if 'data.pkl' not in names:
        return _found(
            path,
            'It is a zip archive of other content',
            'Unpack it and name the checkpoint inside.',
        )
    return None


def why_damaged(path: str, reason: str) -> str:
    """Say what is known of a file that ``torch.load`` began and could not finish.

    Args:
        path (str): A file that :func:`foreign_kind` lets pass.
        reason (str): What torch said.

    Returns:
        str: Two sentences, what was found and what to do.
    """
    head = read_head(path)
    is_zip, is_pickle = head.startswith(b'PK\x03\x04'), head.startswith(b'\x80')
    if not (is_zip or is_pickle):
        return _found(path, 'It is not a checkpoint', NAME_ADVICE)
    if 'Unsupported operand' in reason:
        return _found(
            path,
            'It is a pickle of another kind than torch.save writes by default, '
            'which safe loading cannot read',
            'Save it again with torch.save and its default pickle_protocol.',
        )
    if is_zip and not zipfile.is_zipfile(path):
        kind = (
            'It begins as a checkpoint and lacks its end, so it was copied or '
            'downloaded in part'
        )
    elif is_zip:
        kind = 'It is a checkpoint of which a part is damaged'
    else:
        kind = (
            'It begins as a pickle, so it is a checkpoint in the format of PyTorch '
            'before 1.6 that was copied in part, or no checkpoint'
        )
    return _found(path, kind, DAMAGED_ADVICE)


def _found(path: str, kind: str, advice: str) -> str:
    size = os.path.getsize(path)
    return f'{kind} (first bytes {read_head(path)[:16]!r}, {size:,} bytes). {advice}'
