"""Fixtures that all tests share."""

import contextlib
import functools
import http.server
import json
import os
import random
import re
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_tools import Forked
from hypothesis import settings
from mmengine.config import Config
from mmengine.registry import DefaultScope, init_default_scope
from mmengine.structures import InstanceData
from tool_process import command_of, environment_of
from tool_runs import call_tool
from yapf.yapflib import yapf_api

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent
# the same examples in every run, and no limit of time on a busy machine
settings.register_profile('mmrest', derandomize=True, deadline=None)
settings.load_profile('mmrest')


@pytest.fixture(autouse=True, scope='session')
def no_layout():
    """Texts of configs as they are, for time, see process_site/sitecustomize.py.

    Returns:
        function: yapf's own, for what needs it.
    """
    own = yapf_api.FormatCode
    with pytest.MonkeyPatch.context() as patch:
        for module in ('mmengine.config.config', 'yapf.yapflib.yapf_api'):
            # OneDL's MMEngine imports it at the call
            name = f'{module}.FormatCode'
            patch.setattr(name, lambda text, **_: (text, False), raising=False)
        yield own


@pytest.fixture(autouse=True, scope='session')
def inductor_cache():
    """A cache for each instruction set, which that of PyTorch does not tell apart.

    It is kept for the next run, since compiling takes a minute.
    """
    usual = f'{tempfile.gettempdir()}/torchinductor_{os.getuid()}'
    own = f'_{torch.backends.cpu.get_cpu_capability()}'
    # a test may start pytest
    base = os.environ.get('TORCHINDUCTOR_CACHE_DIR', usual).removesuffix(own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TORCHINDUCTOR_CACHE_DIR', base + own)
        yield


@pytest.fixture(autouse=True, scope='session')
def sigint_for_children() -> None:
    """A shell lets what it starts in the background ignore SIGINT, children too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def file_limit():
    """Limit the size of the files that this process writes: file_limit(bytes)."""
    resource = pytest.importorskip('resource')

    @contextlib.contextmanager
    def limit(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture
def no_scope():
    """No default scope, as in a fresh process, until the test ends."""
    saved = dict(DefaultScope._instance_dict)
    DefaultScope._instance_dict.clear()
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(saved)


@pytest.fixture(scope='session')
def repo() -> Path:
    """The root of the checkout."""
    return REPO


@pytest.fixture(scope='session')
def data_dir() -> Path:
    """The golden arrays and key lists."""
    return TESTS / 'data'


@pytest.fixture
def read(repo):
    """Read a config of this repository, and set its scope: read('folder/name.py')."""

    def read_config(name):
        cfg = Config.fromfile(str(repo / 'configs' / name))
        init_default_scope(cfg.default_scope)
        return cfg

    return read_config


@pytest.fixture(scope='session')
def shared() -> Path:
    """The folder of real images and reference files; not on a user's machine."""
    path = Path(os.environ.get('MMREST_SHARED', REPO.parent / 'shared'))
    if not (path / 'data').is_dir():
        pytest.skip(f'needs the real data of {path} (or set MMREST_SHARED)')
    return path


@pytest.fixture(scope='session')
def published_shapes(data_dir: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """For each published ImageNet checkpoint its keys and shapes."""
    text = (data_dir / 'imagenet_checkpoint_keys.json').read_text()
    return {
        arch: {key: tuple(shape) for key, shape in keys.items()}
        for arch, keys in json.loads(text).items()
    }


@pytest.fixture
def training_batch():
    """One image of 96x64 pixels with two objects: training_batch(masks)."""

    def make(masks):
        from mmdet.structures import DetDataSample
        from mmdet.structures.mask import PolygonMasks

        boxes = torch.tensor([[4.0, 4.0, 60.0, 50.0], [50.0, 20.0, 90.0, 60.0]])
        objects = InstanceData(bboxes=boxes, labels=torch.tensor([0, 5]))
        if masks:
            corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()
            objects.masks = PolygonMasks([[corner] for corner in corners], 64, 96)
        shape = dict(img_shape=(64, 96), ori_shape=(64, 96), scale_factor=(1.0, 1.0))
        sample = DetDataSample(metainfo=shape, gt_instances=objects)
        pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 96), dtype=np.uint8)
        return dict(inputs=[torch.from_numpy(pixels)], data_samples=[sample])

    return make


@pytest.fixture(scope='session')
def detector_shapes(data_dir):
    """Keys and shapes of the four published detectors, by 'kind_rest_arch'."""
    return json.loads((data_dir / 'detectron2_checkpoint_keys.json').read_text())


@pytest.fixture(scope='session')
def published(detector_shapes, data_dir):
    """Make the state dict of a published detector: published(kind, arch)."""
    from published_form import empty
    from weights_rule import fill

    gains = json.loads((data_dir / 'detector_gains.json').read_text())
    made = {}

    def make(kind, arch):
        if (kind, arch) not in made:
            shapes = detector_shapes[f'{kind}_rest_{arch}']
            made[kind, arch] = fill(empty(shapes), gains[kind])
        return dict(made[kind, arch])

    return make


@pytest.fixture(scope='session')
def published_config(repo):
    """Read a _published config: published_config(kind, arch)."""

    def read(kind, arch):
        return Config.fromfile(
            repo / 'configs' / kind / f'rest_{arch}_fpn_1x_published.py'
        )

    return read


@pytest.fixture(scope='session')
def native(published, published_config):
    """Build mmdet's model with converted weights: native(kind, arch)."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    from mmrest.converters import to_mmdet

    def build(kind, arch):
        register_all_modules(init_default_scope=True)  # a tool's run forgets it
        model = MODELS.build(published_config(kind, arch).model)
        weights = to_mmdet(published(kind, arch)).state_dict
        model.load_state_dict(weights, strict=True)
        return model.eval()

    return build


@pytest.fixture(scope='session')
def detect():
    """Run an mmdet model on an image as it is: detect(model, image).

    Gives the features of the FPN and the detections.
    """

    @torch.no_grad()
    def run(model, image):
        from mmdet.structures import DetDataSample

        size = image.shape[:2]
        sample = DetDataSample(
            metainfo={
                'img_shape': size,
                'ori_shape': size,
                'scale_factor': (1.0, 1.0),
            }
        )
        inputs = torch.from_numpy(image).permute(2, 0, 1)
        data = model.data_preprocessor(
            {'inputs': [inputs], 'data_samples': [sample]}, False
        )
        features = model.extract_feat(data['inputs'])
        result = model.predict(data['inputs'], data['data_samples'], rescale=True)
        return features, result[0].pred_instances

    return run


@pytest.fixture(scope='session')
def run(repo):
    """Run a tool as a process; the output of both streams comes back."""

    def run_tool(tool, *args, cwd, fails=False, env=()):
        done = subprocess.run(
            command_of(repo, tool, args),
            cwd=cwd,
            env={**environment_of(repo), **dict(env)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        output = done.stdout + done.stderr
        assert (done.returncode != 0) is fails, output[-6000:]
        return output

    return run_tool


@pytest.fixture(scope='session')
def call(repo):
    """Run a tool within this process; the output of both streams comes back."""
    return functools.partial(call_tool, repo)


@pytest.fixture
def fork(repo, tmp_path):
    """Start a tool as :class:`Forked`; what still runs at the end is ended."""

    started = []

    def start_tool(*args, **kwargs):
        started.append(Forked(repo, tmp_path, *args, **kwargs))
        return started[-1]

    yield start_tool
    for one in started:
        if one.process.poll() is None:
            one.process.kill()


@pytest.fixture
def finish(fork):
    """Run a tool as :class:`Forked`; its output comes back."""

    def run_tool(*args, fails=False, **kwargs):
        run = fork(*args, **kwargs)
        status = run.end(600)
        assert bool(status) is fails, run.output[-6000:]
        return run.output

    return run_tool


@pytest.fixture(scope='session')
def metrics():
    """The metrics that the last test run wrote into a work folder."""

    def read(work_dir):
        files = [p for p in work_dir.glob('*/*.json') if re.match(r'\d+_\d+', p.name)]
        return json.loads(max(files).read_text())

    return read


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
