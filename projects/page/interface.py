"""The content of the page, and its reactions to a user."""

import json
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional

import cv2
import gradio as gr
import numpy as np
from PIL import Image

from mmrest.inference import InferenceError, Inferencer, attend, read_image
from mmrest.inference.attention_pictures import draw_stage
from mmrest.inference.inputs import ImageError
from mmrest.inference.outputs import write_picture

MAX_SIDE = 1600  # pixels; larger pictures are reduced
MIN_SIDE = 480  # smaller pictures are enlarged
SECONDS_KEPT = 3600  # until a user's pictures are deleted after the last use
MAX_STAGES = 4
# Fonts of the system, since gradio's own themes load theirs from a server
THEME = gr.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['monospace'])


class Opened(NamedTuple):
    """A picture of a user.

    Attributes:
        name (str): Name of the file.
        image (ndarray): BGR, at the largest size that is shown.
        samples (list): The prediction of each model.
    """

    name: str
    image: np.ndarray
    samples: list[Any]

    @property
    def factor(self) -> int:
        """Factor by which it is enlarged."""
        return max(1, MIN_SIDE // max(self.image.shape[:2]))


class Page:
    """Answers of the page.

    Args:
        models (dict[str, Inferencer]): One or two, by the name of the checkpoint.
        max_megapixels (float): Limit of a picture.
        folder (Path): Folder for files to download.
    """

    def __init__(
        self, models: dict[str, Inferencer], max_megapixels: float, folder: Path
    ) -> None:
        self.models = models
        self.max_megapixels = max_megapixels
        self.folder = folder
        # hooks of a model and the canvas of a visualizer have one user at a time
        self.lock = threading.Lock()

    def open(self, path: Optional[str], score_thr: float) -> list[Any]:
        """Predict for a file; None if it was removed."""
        image = None if path is None else self._read(path)
        if image is None:
            return [None, *self._nothing()]
        with self.lock:
            samples = [model.predict([image])[0] for model in self.models.values()]
        opened = Opened(Path(path).name, image, samples)
        return [opened, *self.draw(opened, score_thr)]

    def draw(self, opened: Optional[Opened], score_thr: float) -> list[Any]:
        """Return pictures of all models, the files to download, and no attention."""
        if opened is None:
            return self._nothing()
        pictures, found = [], {}
        for (name, model), sample in zip(self.models.items(), opened.samples):
            with self.lock:
                pictures.append(model.draw(opened.image, sample, score_thr))
            found[name] = model.to_dict(sample, score_thr)
        stem = Path(opened.name).stem
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        picture = folder / f'{stem}_found.jpg'
        write_picture(picture, np.concatenate(pictures, axis=1))
        text = folder / f'{stem}_found.json'
        height, width = opened.image.shape[:2]
        content = dict(
            image=opened.name, size=[width, height], score_thr=score_thr, found=found
        )
        text.write_text(json.dumps(content, indent=1) + '\n')
        shown = [_enlarge(picture, opened)[..., ::-1] for picture in pictures]
        buttons = [
            gr.DownloadButton(value=str(p), interactive=True) for p in (picture, text)
        ]
        return [*shown, *buttons, *self._no_attention()]

    def attend(self, opened: Optional[Opened], event: gr.SelectData) -> list[Any]:
        """Return the attention of a point, by stage and model."""
        if opened is None:
            return self._no_attention()
        x, y = (int(n) // opened.factor for n in event.index)
        pictures = []
        for model in self.models.values():
            try:
                with self.lock:
                    point = attend(model, opened.image, x, y)
            except InferenceError as error:
                raise gr.Error(str(error), print_exception=False) from error
            stages = [draw_stage(point, i)[..., ::-1] for i in range(len(point.stages))]
            stages += [None] * (MAX_STAGES - len(stages))
            pictures += [gr.Image(stage, visible=stage is not None) for stage in stages]
        return pictures

    def _read(self, path: str) -> Optional[np.ndarray]:
        """Read a picture; None if it cannot be used, with a message."""
        try:
            self._check_size(path)
            image = read_image(path)
        except (Image.DecompressionBombError, ImageError) as error:
            gr.Warning(
                f'{Path(path).name} {error}.', title='Not a picture', duration=None
            )
            return None
        factor = MAX_SIDE / max(image.shape[:2])
        if factor >= 1:
            return image
        size = [max(1, round(side * factor)) for side in image.shape[1::-1]]
        return cv2.resize(image, size, interpolation=cv2.INTER_AREA)

    def _check_size(self, path: str) -> None:
        try:
            with Image.open(path) as header:
                megapixels = header.width * header.height / 1e6
        except OSError:  # reported when it is read
            return
        if megapixels > self.max_megapixels:
            raise ImageError(
                f'has {megapixels:.1f} megapixels, and the limit is '
                f'{self.max_megapixels:g}'
            )

    def _nothing(self) -> list[Any]:
        buttons = [gr.DownloadButton(value=None, interactive=False)] * 2
        return [*[None] * len(self.models), *buttons, *self._no_attention()]

    def _no_attention(self) -> list[Any]:
        return [gr.Image(None, visible=False)] * (MAX_STAGES * len(self.models))


def build(
    models: dict[str, Inferencer], max_megapixels: float, folder: Path
) -> tuple[gr.Blocks, dict]:
    """Build the page.

    Args:
        models (dict[str, Inferencer]): One or two, by the name of the checkpoint.
        max_megapixels (float): Limit of a picture.
        folder (Path): Folder for files to download.

    Returns:
        tuple[Blocks, dict]: The page, and options for its ``launch``.
    """
    page = Page(models, max_megapixels, folder)
    with gr.Blocks(
        title='mmrest',
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(SECONDS_KEPT, SECONDS_KEPT),
    ) as blocks:
        gr.Markdown('## What the model finds, and what it looks at')
        opened = gr.State(time_to_live=SECONDS_KEPT)
        with gr.Row():
            file = gr.File(label='Drop a picture here', height=140, elem_id='file')
            with gr.Column():
                slider = gr.Slider(
                    0, 1, 0.5, step=0.01, label='Lowest score', elem_id='slider'
                )
                with gr.Row():
                    buttons = [
                        gr.DownloadButton(f'Download {what}', interactive=False)
                        for what in ('picture', 'JSON')
                    ]
        with gr.Row():
            pictures = [
                _image(f'{_short(name)}: click a point', f'picture{n}')
                for n, name in enumerate(models)
            ]
        stages = []
        with gr.Row():
            for n, name in enumerate(models):
                with gr.Column():
                    gr.Markdown(f'#### What a point attends to: {_short(name)}')
                    stages += [
                        _image(None, f'attention{n}_{i}', visible=False)
                        for i in range(MAX_STAGES)
                    ]
        drawn = [*pictures, *buttons, *stages]
        _on(file.upload, page.open, [file, slider], [opened, *drawn])
        _on(file.clear, page.open, [file, slider], [opened, *drawn])
        _on(slider.release, page.draw, [opened, slider], drawn)
        for picture in pictures:
            _on(picture.select, page.attend, [opened], stages)
    options = dict(
        theme=THEME,
        max_file_size='50mb',
        footer_links=[],
        ssr_mode=False,
        quiet=True,
        share=False,
        pwa=False,
    )
    return blocks, options


def _on(
    event: Callable[..., Any], answer: Callable, inputs: list, outputs: list
) -> None:
    # private: no name in an API
    event(answer, inputs, outputs, api_visibility='private', concurrency_limit=2)


def _enlarge(picture: np.ndarray, opened: Opened) -> np.ndarray:
    factor = opened.factor
    return cv2.resize(
        picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC
    )


def _image(label: Optional[str], elem_id: str, visible: bool = True) -> gr.Image:
    return gr.Image(
        label=label,
        show_label=label is not None,
        interactive=False,
        visible=visible,
        format='jpeg',
        buttons=['fullscreen'],
        elem_id=elem_id,
    )


def _short(checkpoint: str) -> str:
    """The last two parts of a path."""
    return '/'.join(Path(checkpoint).parts[-2:])
