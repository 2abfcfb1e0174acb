"""img2dataset's reader of lists, from its own file, without its guesses about text."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import IO, Any

import pyarrow as pa
from pyarrow import csv, json


def reader_class(text: Sequence[str], others: Sequence[str] = ()) -> Any:
    """img2dataset's Reader, for lists with these columns.

    What it asks of pyarrow and pandas is asked with other options: a link of a plain list may hold
    a comma, a caption several lines, "007" and "null" are captions like any other, and what other
    columns there are, perhaps one named "caption" as well, is left alone.

    Args:
        text: columns that are taken as they are written; of csv and txt as bytes.
        others: further ones, of whatever type they look like.
    """
    module = _module()
    columns = [*text, *others]

    def read_csv(
        file: IO[bytes],
        read_options: csv.ReadOptions | None = None,
        parse_options: csv.ParseOptions | None = None,
    ) -> pa.Table:
        if read_options is not None:  # a plain list of links
            how, names = csv.ParseOptions(delimiter="\1"), ["url"]
        else:
            delimiter = parse_options.delimiter if parse_options else ","
            how, names = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True), text
        reading = read_options or csv.ReadOptions()
        reading.use_threads = False  # then errors say in which row
        types = csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.binary()), include_columns=[*names, *others]
        )
        return csv.read_csv(file, reading, how, types)

    def read_json(file: IO[bytes]) -> Any:
        import pandas as pd

        options = {"dtype": False, "convert_dates": False, "encoding": "utf-8-sig"}
        return pd.read_json(file, **options)[columns]  # pyright: ignore

    def read_json_lines(file: IO[bytes]) -> pa.Table:
        return json.read_json(file).select(columns)

    module.csv_pa = SimpleNamespace(  # pyright: ignore
        read_csv=read_csv, ReadOptions=csv.ReadOptions, ParseOptions=csv.ParseOptions
    )
    module.pd = SimpleNamespace(read_json=read_json)  # pyright: ignore
    module.json_pa = SimpleNamespace(read_json=read_json_lines)  # pyright: ignore
    return module.Reader


@functools.cache
def _module() -> ModuleType:
    """The package imports albumentations, which takes six seconds and asks the internet for a newer
    version of itself; its reader alone needs none of it."""
    package = importlib.util.find_spec("img2dataset")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("img2dataset is not installed")
    path = Path(package.submodule_search_locations[0], "reader.py")
    spec = importlib.util.spec_from_file_location("_img2dataset_reader", path)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
