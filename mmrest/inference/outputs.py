"""Predictions as pictures, videos and JSON in a folder, or in a window."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Optional, Union

import cv2
import numpy as np
from rich.progress import track

from .inferencer import InferenceError, Inferencer
from .inputs import Inputs, Item, read_inputs

WINDOW = 'mmrest (q ends)'


def new_folder(path: Union[str, Path]) -> Path:
    """Create a folder, unless it exists and is empty.

    Raises:
        InferenceError: If it holds files, or cannot be created.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InferenceError(
                f'{path} is not empty, and nothing in it is overwritten; name another '
                'folder.'
            )
    except OSError as error:
        raise InferenceError(f'{path} cannot be made: {error.strerror}') from error
    return folder


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write a picture, BGR or grey, in the format of the file's suffix.

    Raises:
        OSError: If it cannot be written.
    """
    if not cv2.imwrite(str(path), np.ascontiguousarray(picture)):
        raise OSError(f'{path} cannot be written')


class OutputFolder:
    """A new folder with pictures in ``vis`` and a JSON file per image in ``preds``.

    Args:
        path (str | Path): The folder. If it exists, it must be empty.

    Raises:
        InferenceError: If it holds files, or cannot be created.
    """

    def __init__(self, path: Union[str, Path]) -> None:
        self.path = new_folder(path)
        for name in ('vis', 'preds'):
            (self.path / name).mkdir()
        self._names: set[str] = set()
        self._video: Optional[cv2.VideoWriter] = None

    def save(
        self, item: Item, picture: np.ndarray, result: dict, labels: Any = None
    ) -> None:
        """Save the prediction of an image.

        Args:
            item (Item): The image.
            picture (ndarray): The image with the prediction, BGR.
            result (dict): The prediction for JSON.
            labels (ndarray, optional): Labels of the pixels, saved as PNG. Default:
                None.

        Raises:
            OSError: If a file cannot be written.
        """
        name = self._free_name(item.name)
        write_picture(self.path / 'vis' / f'{name}.jpg', picture)
        self.save_result(name, item, result, labels)

    def save_frame(
        self, inputs: Inputs, item: Item, picture: np.ndarray, result: dict, labels: Any
    ) -> None:
        """Save the prediction of a frame, with the picture in one video."""
        if self._video is None:
            path = self.path / 'vis' / f'{inputs.name}.mp4'
            size = picture.shape[1], picture.shape[0]
            code = cv2.VideoWriter.fourcc(*'mp4v')
            self._video = cv2.VideoWriter(str(path), code, inputs.fps, size)
            if not self._video.isOpened():
                raise OSError(f'{path} cannot be written')
        self._video.write(picture)
        self.save_result(item.name, item, result, labels)

    def save_result(self, name: str, item: Item, result: dict, labels: Any) -> None:
        """Save the JSON, and the label image of a segmentor."""
        path = self.path / 'preds' / f'{name}.json'
        path.write_text(json.dumps(dict(image=item.name, **result)) + '\n')
        if labels is not None:
            write_picture(self.path / 'preds' / f'{name}.png', labels)

    def close(self) -> None:
        """Finish the video, if there is one."""
        if self._video is not None:
            self._video.release()

    def _free_name(self, file: str) -> str:
        """The name of a file without its ending, or with it if that is taken."""
        stem = Path(file).stem
        name = file if stem in self._names else stem
        self._names.add(name)
        return name


def infer(
    inferencer: Inferencer,
    source: Union[str, Path],
    out_dir: Union[str, Path, None] = None,
    score_thr: float = 0.3,
    batch_size: int = 1,
    show: bool = False,
) -> list[Item]:
    """Predict, draw and save all images of an input.

    Args:
        inferencer (Inferencer): From :func:`init_inferencer`.
        source (str | Path): See :func:`read_inputs`.
        out_dir (str | Path, optional): A new or empty folder, see
            :class:`OutputFolder`.
        score_thr (float): Lowest score of boxes to draw; the JSON holds all boxes.
            Default: 0.3.
        batch_size (int): Images per batch. Default: 1.
        show (bool): Whether to show the pictures in a window, one after the other.
            ``q`` quits, any other key continues. Default: False.

    Returns:
        list[Item]: Images that could not be read. They are also reported on standard
        error.

    Raises:
        InferenceError: If the input, the folder or the window cannot be opened.
    """
    if show:
        check_window()
    inputs = read_inputs(source)
    folder = OutputFolder(out_dir) if out_dir is not None else None
    skipped: list[Item] = []
    items = track(inputs.items, 'Inference', inputs.total)
    try:
        for batch in _batches(_readable(items, skipped), batch_size):
            for item, sample in _predict(inferencer, batch, skipped):
                picture = inferencer.draw(item.image, sample, score_thr)
                result = inferencer.to_dict(sample)
                labels = inferencer.label_image(sample)
                if folder and inputs.fps:
                    folder.save_frame(inputs, item, picture, result, labels)
                elif folder:
                    folder.save(item, picture, result, labels)
                if show and not _show(picture, wait=not inputs.fps):
                    return skipped
    except KeyboardInterrupt:
        if not inputs.fps:
            raise
        print('stopped', file=sys.stderr)  # the way to stop a camera
    finally:
        if folder:
            folder.close()
        if show:
            cv2.destroyAllWindows()
    return skipped


def check_window() -> None:
    """Check that a window can be opened, since otherwise Qt ends the process.

    Raises:
        InferenceError: If it cannot.
    """
    displays = ('DISPLAY', 'WAYLAND_DISPLAY')
    if sys.platform == 'linux' and not any(os.environ.get(name) for name in displays):
        raise InferenceError(
            '--show needs a screen, and neither DISPLAY nor WAYLAND_DISPLAY is set. '
            'Give --out-dir instead.'
        )
    try:
        cv2.namedWindow(WINDOW, cv2.WINDOW_NORMAL)
    except cv2.error as error:
        raise InferenceError(
            '--show needs an OpenCV with windows, and opencv-python-headless is '
            'installed. Give --out-dir instead.'
        ) from error


def _show(picture: np.ndarray, wait: bool) -> bool:
    cv2.imshow(WINDOW, picture)
    return cv2.waitKey(0 if wait else 1) & 0xFF not in (ord('q'), 27)


def _readable(items: Iterable[Item], skipped: list[Item]) -> Iterator[Item]:
    for item in items:
        if item.error:
            _skip(item, skipped)
        else:
            yield item


def _skip(item: Item, skipped: list[Item]) -> None:
    skipped.append(item)
    print(f'skipped: {item.name} {item.error}', file=sys.stderr)


def _predict(
    inferencer: Inferencer, batch: list[Item], skipped: list[Item]
) -> list[tuple[Item, Any]]:
    """Yield items with predictions, except those that the pipeline cannot resize."""
    try:
        return list(zip(batch, inferencer.predict([item.image for item in batch])))
    except cv2.error as error:
        if len(batch) > 1:
            alone = (_predict(inferencer, [item], skipped) for item in batch)
            return [pair for pairs in alone for pair in pairs]
        height, width = batch[0].image.shape[:2]
        reason = f'({width}x{height} pixels) cannot be resized: {error.err}'
        _skip(batch[0]._replace(error=reason), skipped)
        return []


def _batches(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    return iter(lambda: list(islice(items, size)), [])
