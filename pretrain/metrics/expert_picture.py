"""The load of the experts as a picture, for places that take no page. In: experts.jsonl. Out: an image.

Torch-free.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pretrain.metrics.expert_loads import expert_loads

if TYPE_CHECKING:
    from PIL.Image import Image

_WIDTH, _HEIGHT, _MARGIN, _LINE = 960, 480, 72, 18
# matplotlib's viridis at 0, 1/4, 1/2, 3/4 and 1.
_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64)


def expert_picture(path: Path) -> Image | None:
    """Largest load over the mean by MoE layer (down) and step (to the right), RGB. None: the file has no rows.

    Raises OSError, and ImportError without Pillow.
    """
    from PIL import Image, ImageDraw  # noqa: PLC0415  optional: pip install 'phalanx[report]'

    found = expert_loads(path)
    if found is None:
        return None
    ratio = np.array(found["ratio"], dtype=np.float64)
    most = max(float(ratio.max()), 1.0 + 1e-9)
    place = (ratio - 1.0) / (most - 1.0) * (len(_COLOURS) - 1)
    channels = [np.interp(place, range(len(_COLOURS)), _COLOURS[:, channel]) for channel in range(3)]
    heat = Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))
    image = Image.new("RGB", (_WIDTH + 2 * _MARGIN, _HEIGHT + 4 * _LINE), "white")
    image.paste(heat.resize((_WIDTH, _HEIGHT), Image.Resampling.NEAREST), (_MARGIN, 2 * _LINE))
    draw, steps, layers = ImageDraw.Draw(image), found["steps"], found["layers"]
    title = (
        f"largest load of an expert over its layer's mean: 1.0 (dark) to {most:.2f} (yellow), {found['experts']} experts a layer"
    )
    below = 2 * _LINE + _HEIGHT + 4
    for at, text, anchor in (
        ((_MARGIN, _LINE // 2), title, "la"),
        ((_MARGIN - 6, 2 * _LINE), f"layer {layers[0]}", "ra"),
        ((_MARGIN - 6, below - 6), f"layer {layers[-1]}", "rs"),
        ((_MARGIN, below), f"step {steps[0]}", "la"),
        ((_MARGIN + _WIDTH, below), f"step {steps[-1]}", "ra"),
    ):
        draw.text(at, text, fill="black", anchor=anchor)
    return image
