"""Files that are no checkpoints end in one clear error, and run nothing."""

import argparse
import functools
import io
import json
import os
import pickle
import threading
import zipfile

import numpy as np
import pytest
import torch

from mmrest.checkpoint import CheckpointError, read_checkpoint, read_state_dict
from mmrest.checkpoint.reading import RefusedError
from mmrest.checkpoint.safe_globals import FORCE_SAFE, FORCE_UNSAFE, weights_only_forced


def saved(content, **kwargs):
    """The bytes of a checkpoint."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **kwargs)
    return buffer.getvalue()


@pytest.mark.parametrize(
    'content, found',
    [
        (b'', 'empty (0 bytes)'),
        (b'\0' * 4096, 'zero bytes'),
        (b'<!DOCTYPE html><html><body>Sign in</body>', 'HTML'),
        (b'\n\n  <html lang="en">', 'HTML'),
        (b'\xef\xbb\xbf<?xml version="1.0"?><Error/>', 'HTML or XML'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:0', 'git lfs pull'),
        (b'\xff\xd8\xff\xe0\0\x10JFIF' + bytes(range(256)), 'not a checkpoint'),
        (b'{"state_dict": {}}', 'not a checkpoint'),
        (b'\x1f\x8b\x08\0' + bytes(64), 'gzip'),
        (b'weights: none, this is a text file\n' * 9, 'not a checkpoint'),
        (b'\x07\x01\x02' * 999, 'not a checkpoint'),
    ],
)
def test_other_files(tmp_path, content, found):
    path = tmp_path / 'x.pth'
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    assert found in str(error.value)
    assert str(path) in str(error.value)
    if content.strip(b'\0'):
        assert f'{len(content):,} bytes' in str(error.value)
        assert repr(content[:16]) in str(error.value)
    assert 'weights_only' not in str(error.value)


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('part', [0.001, 0.03, 0.3, 0.5, 0.9, 0.9999])
def test_truncated(tmp_path, zipped, part):
    content = saved(
        {f'layer{i}.weight': torch.randn(50, 20) for i in range(20)},
        _use_new_zipfile_serialization=zipped,
    )
    path = tmp_path / 'half.pth'
    path.write_bytes(content)
    assert len(read_state_dict(path)) == 20
    path.write_bytes(content[: max(int(len(content) * part), 5)])
    with pytest.raises(CheckpointError, match='copied or downloaded in part|copied in'):
        read_checkpoint(path)


def test_other_archives(tmp_path):
    path = tmp_path / 'x.pth'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('readme.txt', 'hello')
    with pytest.raises(CheckpointError, match='zip archive of other content'):
        read_checkpoint(path)
    torch.jit.trace(torch.nn.Linear(2, 2), torch.rand(1, 2)).save(str(path))
    with pytest.raises(CheckpointError, match='TorchScript archive, which holds code'):
        read_checkpoint(path)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_pickle_of_another_protocol(tmp_path, weights):
    path = tmp_path / 'x.pkl'
    path.write_bytes(pickle.dumps({'model': {'w': np.ones(3)}}, protocol=4))
    with pytest.raises(CheckpointError, match='Save it again with torch.save'):
        read_checkpoint(path)
    path.write_bytes(saved(weights, pickle_protocol=4))
    with pytest.raises(CheckpointError, match='Save it again with torch.save'):
        read_checkpoint(path)


@pytest.mark.parametrize('kind', [CheckpointError, OSError, FileNotFoundError])
def test_no_such_file(tmp_path, save, weights, kind):
    save(weights, 'here.pth')
    (tmp_path / 'bare').mkdir()
    for name, found in (
        ('there.pth', r'does not exist.*here\.pth'),
        ('nowhere/there.pth', 'does not exist either'),
        ('', r'is a folder.*here\.pth'),
        ('bare', 'without a .pth'),
    ):
        with pytest.raises(kind, match=found):
            read_checkpoint(tmp_path / name)


@pytest.mark.parametrize('source', ['', None, 3, ['a.pth']])
def test_no_path(source):
    with pytest.raises(CheckpointError, match='a path or a URL'):
        read_checkpoint(source)


def test_home_is_expanded(save, weights, tmp_path, monkeypatch):
    save(weights, 'x.pth')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert set(read_state_dict('~/x.pth')) == set(weights)


def test_payload(save, weights, payload, monkeypatch):
    """Its forms are in hostile/; here the environment asks for unsafe loading."""
    monkeypatch.setenv(FORCE_UNSAFE, '1')
    path = save({'state_dict': weights, 'extra': payload})
    with pytest.raises(RefusedError, match=r'posix\.system|nt\.system') as error:
        read_checkpoint(path)
    # torch's own text advises to switch safety off
    assert 'weights_only' not in str(error.value)


class Reduced:
    """Pickled as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    'extra, name',
    [
        (argparse.Namespace(lr=0.1), 'argparse.Namespace'),
        (torch.nn.Linear(2, 2), 'torch.nn.modules.linear.Linear'),
        (Reduced(eval, ('1+1',)), 'eval'),
        (Reduced(functools.partial, (print,)), 'functools.partial'),
        (Reduced(getattr, (torch.Tensor, 'numpy')), 'getattr'),
        (Reduced(getattr, ('text', 'format')), 'getattr'),
        (np.array([1, 'a'], dtype=object), 'numpy'),
        (np.zeros(2, dtype='f4,i4'), 'numpy'),
    ],
)
def test_refused_objects_are_named(save, weights, extra, name):
    path = save({'model': weights, 'args': extra})
    with pytest.raises(RefusedError) as error:
        read_checkpoint(path)
    assert name in error.value.name
    assert name in str(error.value)
    assert 'torch.save' in str(error.value)


def test_beside_the_weights(save, weights):
    """What training saves beside them does no harm."""
    extra = {
        'optimizer': torch.optim.AdamW(
            [torch.nn.Parameter(torch.ones(2))]
        ).state_dict(),
        'epoch': 3,
        'scaler': None,
        'best': np.float64(0.5),
        'palette': np.array([[1, 2], [3, 4]], dtype=np.uint8, order='F'),
        'names': np.array(['ab', 'c']),
        'swapped': np.array([1, 2], dtype='>i4'),
        'nothing': np.array([], dtype='i4'),
        'flag': np.bool_(True),
    }
    checkpoint = read_checkpoint(save({'state_dict': weights, **extra}))
    for key in ('palette', 'names', 'swapped', 'nothing'):
        assert isinstance(checkpoint[key], np.ndarray)
        assert np.array_equal(checkpoint[key], extra[key])
        # numpy turns foreign byte orders into its own
        assert checkpoint[key].dtype == extra[key].dtype.newbyteorder('=')
    assert checkpoint['best'] == 0.5 and checkpoint['flag']
    # saved again, no trace of the stand-ins is left
    assert b'mmrest' not in saved(checkpoint)


def test_url(server, weights, tmp_path):
    url, root = server
    torch.save({'model': weights}, root / 'rest.pth')
    state = read_state_dict(f'{url}/rest.pth')
    assert torch.equal(state['weight'], weights['weight'])
    assert (tmp_path / 'hub' / 'checkpoints' / 'rest.pth').exists()
    (root / 'rest.pth').unlink()  # from now on the cache serves
    assert set(read_state_dict(f'{url}/rest.pth')) == set(weights)


def test_bad_urls(server, tmp_path):
    url, root = server
    for kind in (CheckpointError, OSError):
        with pytest.raises(kind, match='not be downloaded: HTTP Error 404'):
            read_checkpoint(f'{url}/none.pth')
    assert not (tmp_path / 'hub' / 'checkpoints' / 'none.pth').exists()
    with pytest.raises(CheckpointError, match='name of a file'):
        read_checkpoint(f'{url}/')
    (root / 'page.pth').write_text('<html>please log in</html>')
    with pytest.raises(CheckpointError, match=r'HTML.*') as error:
        read_checkpoint(f'{url}/page.pth')
    assert 'delete that file to download it again' in str(error.value)


def test_names_of_mmengine(server, payload, weights, monkeypatch, tmp_path):
    """open-mmlab:// goes through mmengine, with safe loading forced."""
    url, root = server
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    monkeypatch.setenv(FORCE_UNSAFE, '1')
    urls = {'good': f'{url}/good.pth', 'evil': f'{url}/evil.pth'}
    (tmp_path / 'open_mmlab.json').write_text(json.dumps(urls))
    torch.save({'state_dict': weights}, root / 'good.pth')
    torch.save({'state_dict': payload}, root / 'evil.pth')
    assert set(read_state_dict('open-mmlab://good')) == set(weights)
    with pytest.raises(RefusedError):
        read_state_dict('open-mmlab://evil')
    with pytest.raises(CheckpointError, match='knows no checkpoint'):
        read_state_dict('open-mmlab://none')
    with pytest.raises(FileNotFoundError, match='knows no checkpoint'):
        read_state_dict('nosuchscheme://none')
    assert FORCE_SAFE not in os.environ and os.environ[FORCE_UNSAFE] == '1'


def test_threads_do_not_switch_each_other_unsafe(monkeypatch):
    """Reading two names at a time: each is safe to its end, and nothing is left."""
    monkeypatch.setenv(FORCE_UNSAFE, '1')
    monkeypatch.delenv(FORCE_SAFE, raising=False)
    begun, both, seen = threading.Event(), threading.Event(), []

    def first():
        with weights_only_forced():
            begun.set()
            both.wait(timeout=0.3)  # in vain, if the other waits for this one's end
            seen.append(os.environ.get(FORCE_SAFE))

    def second():
        begun.wait()
        with weights_only_forced():
            both.set()
            first_thread.join()
            seen.append(os.environ.get(FORCE_SAFE))

    first_thread = threading.Thread(target=first)
    second_thread = threading.Thread(target=second)
    for thread in (first_thread, second_thread):
        thread.start()
    for thread in (first_thread, second_thread):
        thread.join()
    assert seen == ['1', '1']
    assert FORCE_SAFE not in os.environ and os.environ[FORCE_UNSAFE] == '1'
