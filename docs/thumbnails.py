"""Pictures for the cards of the lessons: ``python docs/thumbnails.py`` after ``make docs``.

Takes one picture out of each executed lesson, makes it small, and writes it to ``_static/lessons``.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).resolve().parent
EXECUTED = DOCS / "_build" / "jupyter_execute" / "lessons"
WIDTH, RATIO = 480, 0.62
# Which picture of the lesson, counted from 0.
CHOICE = {1: 0, 2: 0, 3: 1, 4: 0, 5: 2, 6: 2, 7: 4, 8: 0}


def images(notebook: Path) -> list[Image.Image]:
    """All pictures that the cells put out."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    outputs = [o for cell in cells for o in cell.get("outputs", [])]
    pngs = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB") for png in pngs]


def card(image: Image.Image) -> Image.Image:
    """The whole picture on a white ground of one shape for all."""
    ground = Image.new("RGB", (WIDTH, round(WIDTH * RATIO)), "white")
    image.thumbnail(ground.size)
    ground.paste(image, ((ground.width - image.width) // 2, (ground.height - image.height) // 2))
    return ground


def main() -> None:
    """Write all cards."""
    target = DOCS / "_static" / "lessons"
    target.mkdir(exist_ok=True)
    for number, index in CHOICE.items():
        (notebook,) = EXECUTED.glob(f"{number}-*.ipynb")
        card(images(notebook)[index]).quantize(256).save(target / f"{number}.png", optimize=True)


if __name__ == "__main__":
    main()
