"""A command that leaves a trace, and a web server of hostile files."""

import functools
import http.server
import shlex
import sys
import threading
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
# payload_forms.py, toy_run.py, dirty_sandbox.py
for folder in (HERE, HERE.parent / 'test_checkpoint', HERE.parent / 'test_dirty_data'):
    sys.path.insert(0, str(folder))


class Trace:
    """The command of a payload, and whether it was run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.command = f'touch {shlex.quote(str(path))}'

    @property
    def left(self) -> bool:
        return self.path.exists()


@pytest.fixture
def trace(tmp_path):
    trace = Trace(tmp_path / 'executed')
    yield trace
    assert not trace.left, 'the payload was executed'


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server of ``tmp_path / 'web'`` and an empty cache of torch.hub."""
    root = tmp_path / 'web'
    root.mkdir()
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    for name in ('http_proxy', 'HTTP_PROXY'):
        monkeypatch.delenv(name, raising=False)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            """Keep quiet."""

    handler = functools.partial(Handler, directory=str(root))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as httpd:
        # polls often, so that hundreds of servers end at once
        serve = functools.partial(httpd.serve_forever, poll_interval=0.01)
        threading.Thread(target=serve, daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}', root
        httpd.shutdown()
