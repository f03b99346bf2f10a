"""Fetching weights from a server that plays Google Drive."""

import functools
import hashlib
import http.server
import io
import os
import pickle
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from torch import nn
from weights_rule import fill

from mmrest import ResT, ResTV2, weights
from mmrest.checkpoint import (
    CheckpointNotFoundError,
    read_checkpoint,
    read_state_dict,
)

pytest.importorskip('gdown')
requests = pytest.importorskip('requests')

ARCH = dict(
    embed_dims=[4, 4, 4, 4],
    num_heads=[1, 2, 2, 2],
    depths=[1, 1, 1, 1],
    sr_ratios=[2, 2, 2, 1],
    mlp_ratios=1,
)
AUTHORS = weights.MODELS['rest_lite'].sources[0].drive_id
PORT = weights.MODELS['rest_lite'].sources[1].drive_id
FILE_IN_FOLDER = 'a' * 33
LOGIN = b'<html><title>Sign in</title></html>'


def state_dict(kind=ResT, **options):
    model = kind(ARCH, out_indices=(3,), **options)
    model.head = nn.Linear(4, 1000)
    return fill(model.state_dict())


def pth(**options):
    buffer = io.BytesIO()
    # larger than the pieces in which gdown receives
    rest = torch.zeros(500_000)
    torch.save({'model': state_dict(**options), 'optimizer': {'0': rest}}, buffer)
    return buffer.getvalue()


class Drive(http.server.BaseHTTPRequestHandler):
    """Google Drive as gdown knows it: folders, a page of confirmation, ranges.

    ``server.files`` holds contents by id, ``server.folder`` the ids of a folder by
    name. A file answers with what ``server.faults`` has for its id, as often as that
    says: a status, a page, or half of the content.
    """

    def log_message(self, *args):
        """Keep quiet."""

    def page(self, content, status=200):
        self.send_response(status)
        self.send_header('Content-Type', 'text/html')
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        query = parse_qs(urlsplit(self.path).query)
        key = query['id'][0]
        self.server.asked.append(self.path)
        if urlsplit(self.path).path == '/embeddedfolderview':
            if self.server.folder is None:
                return self.page(b'gone', 404)
            links = ''.join(
                f'<a href="https://drive.google.com/file/d/{i}/view">{name}</a>'
                for name, i in self.server.folder.items()
            )
            return self.page(f'<title>ResT</title>{links}'.encode())
        if key not in self.server.files:
            return self.page(b'gone', 404)
        if 'confirm' not in query:
            form = (
                '<form id="download-form" action="https://drive.google.com/download">'
            )
            for name, value in (('id', key), ('confirm', 't')):
                form += f'<input type="hidden" name="{name}" value="{value}">'
            return self.page(f'{form}</form>'.encode())
        faults = self.server.faults.get(key, [])
        fault = faults.pop(0) if faults else None
        if fault == 'page':
            return self.page(LOGIN)
        return self.send_file(self.server.files[key], fault)

    def send_file(self, content, fault):
        start = int(re.sub(r'\D', '', self.headers.get('Range', '0')))
        self.server.starts.append(start)
        if fault == 'no ranges':
            start = 0
        self.send_response(206 if start else 200)
        self.send_header('Content-Type', 'application/octet-stream')
        self.send_header('Content-Disposition', 'attachment; filename="x"')
        self.send_header('Content-Length', str(len(content) - start))
        if start:
            whole = f'bytes {start}-{len(content) - 1}/{len(content)}'
            self.send_header('Content-Range', whole)
        self.end_headers()
        end = (len(content) + start) // 2 if fault == 'break' else len(content)
        self.wfile.write(content[start:end])


@pytest.fixture
def drive(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ('rest_lite', 'restv2_tiny'):
        small = weights.MODELS[name]._replace(arch=ARCH)
        monkeypatch.setitem(weights.MODELS, name, small)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Drive)
    server.files, server.folder, server.faults = {}, {}, {}
    server.asked, server.starts = [], []
    send = requests.adapters.HTTPAdapter.send

    def send_here(adapter, request, **options):
        at = urlsplit(request.url)
        request.url = f'http://127.0.0.1:{server.server_port}{at.path}?{at.query}'
        return send(adapter, request, **{**options, 'proxies': {}})

    monkeypatch.setattr(requests.adapters.HTTPAdapter, 'send', send_here)
    serve = functools.partial(server.serve_forever, poll_interval=0.01)
    threading.Thread(target=serve, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    """Where the weights are put; nothing half may be there after a test."""
    folder = tmp_path / 'pretrained'
    yield folder
    files = [p.name for p in folder.glob('*.*') if p.is_file()]
    assert all(re.fullmatch(r'rest\w+\.pth', name) for name in files), files


def assert_whole(path):
    expected = state_dict()
    read = read_state_dict(path)
    assert read.keys() >= {k for k in expected if 'num_batches' not in k}
    assert all(torch.equal(read[name], expected[name]) for name in read)


def test_from_the_authors(drive, folder, capsys):
    """A second call leaves the file alone."""
    drive.folder = {'notes.txt': 'b' * 33, 'ResT-Lite.pth': FILE_IN_FOLDER}
    drive.files[FILE_IN_FOLDER] = pth()
    assert weights.main(['rest_lite']) == 0
    path = folder / 'rest_lite.pth'
    assert_whole(path)
    assert 'optimizer' not in torch.load(path)
    assert [p.name for p in folder.iterdir()] == ['rest_lite.pth']
    sha256 = hashlib.sha256(drive.files[FILE_IN_FOLDER]).hexdigest()
    assert f'SHA-256 {sha256}' in capsys.readouterr().out
    asked = len(drive.asked)
    assert weights.main(['rest_lite']) == 0 and len(drive.asked) == asked


def test_from_the_port(drive, folder):
    """The authors' folder is gone; the other file becomes one of PyTorch."""
    drive.folder = None
    arrays = {
        re.sub(
            r'stage(\d)',
            lambda m: f'stages.{int(m[1]) - 1}',
            re.sub(
                r'patch_embed_(\d)', lambda m: f'patch_embeds.{int(m[1]) - 2}', name
            ),
        )
        .replace('running_mean', '_mean')
        .replace('running_var', '_variance'): (t.T if t.dim() == 2 else t).numpy()
        for name, t in state_dict().items()
        if 'num_batches' not in name
    }
    drive.files[PORT] = pickle.dumps(arrays, 4)
    path = weights.fetch('rest_lite')
    assert_whole(path)
    assert not (folder / '.unfinished').exists()


def test_breaks_are_continued(drive, folder):
    """Within a call, and by the next one."""
    drive.folder = {'rest_lite.pth': FILE_IN_FOLDER}
    drive.files[FILE_IN_FOLDER] = pth()
    # each attempt to continue asks twice: for the whole, and for the rest
    drive.faults[FILE_IN_FOLDER] = ['break', None, 'break', None, 'break']
    with pytest.raises(weights.WeightsError, match='continues from there'):
        weights.fetch('rest_lite', origin='authors')
    assert not (folder / 'rest_lite.pth').exists()
    weights.fetch('rest_lite', origin='authors')
    assert_whole(folder / 'rest_lite.pth')
    first, second, third = (start for start in drive.starts if start)
    assert 0 < first <= second <= third


def test_two_at_once(drive, folder):
    """As the ranks of a run do: the second waits, and takes what is there then."""
    drive.folder = {'rest_lite.pth': FILE_IN_FOLDER}
    drive.files[FILE_IN_FOLDER] = pth()
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(weights.fetch, ['rest_lite'] * 2):
            assert_whole(folder / 'rest_lite.pth')
    assert len(drive.starts) == 1


def test_source_that_cannot_continue(drive, folder):
    drive.folder = {'rest_lite.pth': FILE_IN_FOLDER}
    drive.files[FILE_IN_FOLDER] = pth()
    drive.faults[FILE_IN_FOLDER] = ['break', None, 'no ranges']
    weights.fetch('rest_lite', origin='authors')
    assert_whole(folder / 'rest_lite.pth')


@pytest.mark.parametrize(
    ('fault', 'content', 'message'),
    [
        ('page', pth(), 'a page instead of the file'),
        (None, LOGIN, 'HTML'),
        (None, pth()[:-100], 'lacks its end'),
        (None, pth(kind=ResTV2, out_norm='final'), "set type='ResTV2'"),
        (None, None, 'HTTP status 404|a page instead'),
    ],
)
def test_wrong_answers(fault, content, message, drive, folder, capsys):
    """One message with the reason, the links, and the way by hand."""
    drive.folder = {'rest_lite.pth': FILE_IN_FOLDER}
    if content is not None:
        drive.files[FILE_IN_FOLDER] = content
    drive.faults[FILE_IN_FOLDER] = [fault]
    assert weights.main(['rest_lite']) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error)
    assert f'file/d/{PORT}' in error and 'pan.baidu.com' in error
    assert '--from FILE' in error
    assert not folder.exists() or not any(folder.iterdir())


@pytest.mark.parametrize('field', [dict(size=5), dict(sha256='0' * 64)])
def test_known_size_and_hash(field, drive, folder, monkeypatch):
    small = weights.MODELS['rest_lite']
    source = small.sources[0]._replace(is_folder=False, drive_id='x', **field)
    small = small._replace(sources=(source,))
    monkeypatch.setitem(weights.MODELS, 'rest_lite', small)
    drive.files['x'] = pth()
    with pytest.raises(weights.WeightsError, match='the file has'):
        weights.fetch('rest_lite')
    assert not any(folder.iterdir())


def test_folder_without_the_file(drive):
    drive.folder = {'rest_small.pth': FILE_IN_FOLDER}
    with pytest.raises(weights.WeightsError, match=r'but rest_small\.pth'):
        weights.fetch('rest_lite', origin='authors')


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fail(adapter, request, **options):
        raise requests.ConnectionError('no route', request=request)

    monkeypatch.setattr(requests.adapters.HTTPAdapter, 'send', fail)
    with pytest.raises(weights.WeightsError) as error:
        weights.fetch('restv2_tiny')
    assert 'the connection to drive.google.com failed' in str(error.value)


def test_without_gdown(tmp_path, monkeypatch):
    """The links and the way by hand are there all the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, 'gdown', None)
    with pytest.raises(weights.WeightsError, match='pip install') as error:
        weights.fetch('rest_base')
    assert '--from FILE' in str(error.value) and not any(tmp_path.iterdir())


def test_full_disk_while_downloading(drive, folder, file_limit):
    """What was received is kept, and goes on once there is room."""
    drive.folder = {'rest_lite.pth': FILE_IN_FOLDER}
    drive.files[FILE_IN_FOLDER] = pth()
    failing = pytest.raises(weights.WeightsError, match='could not be written')
    with file_limit(1_000_000), failing as error:
        weights.fetch('rest_lite', origin='authors')
    assert 'is kept' in str(error.value) and not (folder / 'rest_lite.pth').exists()
    weights.fetch('rest_lite', origin='authors')
    assert_whole(folder / 'rest_lite.pth')
    assert max(drive.starts) > 0


def test_full_disk(drive, folder, monkeypatch, tmp_path):
    (tmp_path / 'mine.pth').write_bytes(pth())

    def fail(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(weights.WeightsError, match='No space left') as error:
        weights.fetch('rest_lite', start='mine.pth')
    assert 'rest_lite.pth could not be written' in str(error.value)
    assert not any(folder.iterdir())


@pytest.mark.parametrize('where', ['file', 'url'])
def test_from_elsewhere(where, drive, folder, tmp_path):
    (tmp_path / 'mine.pth').write_bytes(pth())
    drive.files['x'] = pth()
    start = dict(file='mine.pth', url='https://mirror.org/mine.pth?id=x&confirm=t')
    weights.fetch('rest_lite', start=start[where])
    assert_whole(folder / 'rest_lite.pth')
    assert (tmp_path / 'mine.pth').exists()


def test_existing_file_is_left_alone(drive, folder):
    folder.mkdir()
    (folder / 'rest_lite.pth').write_bytes(b'mine')
    with pytest.raises(weights.WeightsError, match='was not replaced'):
        weights.fetch('rest_lite')
    assert (folder / 'rest_lite.pth').read_bytes() == b'mine'


def test_list_and_names(capsys, published_shapes):
    assert weights.main(['--list']) == 0
    listed = capsys.readouterr().out
    for name in [*weights.MODELS, *weights.BAIDU_ONLY]:
        assert f'\n{name} ' in listed
    assert set(published_shapes) <= set(weights.MODELS)
    for name, message in (
        ('rest_bas', 'rest_base'),
        ('mask_rcnn_rest_base', 'detectron2_to_mmdet'),
        ('upernet_restv2_tiny', 'tools/test.py configs/upernet/restv2_tiny'),
    ):
        assert weights.main([name]) == 1
        assert message in capsys.readouterr().err


def test_every_published_shape_is_known(published_shapes, tmp_path):
    """The model that a file is checked against has the published names and shapes."""
    tensors = {k: torch.zeros(s) for k, s in published_shapes['restv2_tiny'].items()}
    torch.save(tensors, tmp_path / 'x.pth')
    assert weights.check(tmp_path / 'x.pth', 'restv2_tiny').keys() == tensors.keys()
    del tensors['head.bias']
    torch.save(tensors, tmp_path / 'x.pth')
    with pytest.raises(weights.WeightsError, match=r'Missing in the file .*head\.bias'):
        weights.check(tmp_path / 'x.pth', 'restv2_tiny')


@pytest.mark.parametrize(
    ('path', 'command'),
    [
        ('pretrained/rest_base.pth', '`python -m mmrest.weights rest_base`'),
        ('other/restv2_tiny.pth', 'restv2_tiny --folder other`'),
    ],
)
def test_error_of_a_missing_file_names_the_command(path, command):
    with pytest.raises(CheckpointNotFoundError) as error:
        read_checkpoint(path)
    assert command in str(error.value)
    with pytest.raises(CheckpointNotFoundError) as error:
        read_checkpoint('mine.pth')
    assert 'mmrest.weights' not in str(error.value)
