"""Contact sheets: pictures in a grid, what they were made from underneath."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT_SIZE = 12
LINE = 15  # pixels
MARGIN = 8
MIN_SIDE = 128  # smaller pictures are enlarged


def contact_sheet(
    cells: Sequence[tuple[str, Sequence[np.ndarray]]], columns: int = 0, footer: str = ""
) -> Image.Image:
    """A white sheet with one cell a caption.

    Args:
        cells: caption and its pictures, uint8 (H, W, 3), shown side by side. All of one size, and
            the same number in each cell.
        columns: cells a row; 0 makes the sheet about square.
        footer: text at the bottom, for attributions.
    """
    font = ImageFont.load_default(FONT_SIZE)
    beside = len(cells[0][1])
    height, width = cells[0][1][0].shape[:2]
    zoom = max(1, -(-MIN_SIDE // width))
    height, width = height * zoom, width * zoom
    columns = columns or min(len(cells), max(1, round((len(cells) / beside) ** 0.5)))
    characters = beside * width // 6  # about six pixels each at this size
    captions = [textwrap.wrap(caption, characters) for caption, _ in cells]
    cell_height = height + LINE * max(map(len, captions)) + MARGIN
    cell_width = beside * width + MARGIN
    rows = -(-len(cells) // columns)
    sheet_width = columns * cell_width + MARGIN
    closing = textwrap.wrap(footer, sheet_width // 6)
    bottom = rows * cell_height + MARGIN
    size = (sheet_width, bottom + LINE * len(closing) + (MARGIN if closing else 0))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, (lines, (_, pictures)) in enumerate(zip(captions, cells, strict=True)):
        left = MARGIN + number % columns * cell_width
        top = MARGIN + number // columns * cell_height
        for place, picture in enumerate(pictures):
            shown = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(shown, (left + place * width, top))
        for row, line in enumerate(lines):
            draw.text((left, top + height + row * LINE), line, fill="black", font=font)
    for row, line in enumerate(closing):
        draw.text((MARGIN, bottom + row * LINE), line, fill="grey", font=font)
    return sheet
