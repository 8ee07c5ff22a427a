"""Rows on disk, one JSON object a scene and task, and the table that sums them up."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from gen3r_engine.evaluation.paper_data import DATA_SETS
from gen3r_engine.evaluation.paper_published import PUBLISHED
from gen3r_engine.evaluation.paper_scores import FIGURES, figures_of

Row = dict[str, Any]


@dataclass
class Rows:
    """The rows of a file that were made with the same settings; others stay in it untouched.

    path : JSON lines; need not exist. settings : plain JSON values that the figures depend on.
    damaged : lines that could not be read, such as the last one of a run that was cut off.
    """

    path: Path
    settings: dict[str, Any]
    kept: list[Row] = field(default_factory=list)
    damaged: int = 0

    def __post_init__(self) -> None:
        self.settings = json.loads(json.dumps(self.settings))  # as a row read back has them
        for row in self._read():
            if row.get("settings") == self.settings:
                self.kept.append(row)

    def _read(self) -> Iterator[Row]:
        if not self.path.is_file():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            if isinstance(row, dict):
                yield row
            elif line.strip():
                self.damaged += 1

    def has(self, key: Row) -> bool:
        """Whether a row with these values (data set, scene, cameras, task) is there."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.kept)

    def add(self, key: Row, figures: dict[str, float]) -> None:
        """Append a row and have it on disk before the next scene begins; folders are made.

        Raises
        ------
        OSError : the file cannot be written.
        """
        row = {**key, "figures": figures, "settings": self.settings}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # a run that was cut off
                    file.write(b"\n")
            file.write(json.dumps(row).encode() + b"\n")
        self.kept.append(row)


def measured(rows: Sequence[Row], dataset: str, task: str, figure: str) -> list[float]:
    """The figure of every scene that has it."""
    return [
        row["figures"][figure]
        for row in rows
        if (row["dataset"], row["task"]) == (dataset, task)
        and math.isfinite(row["figures"].get(figure, math.nan))
    ]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error (NaN of a single value)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    square = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(square / len(values))


def summary(
    rows: Sequence[Row],
    datasets: Sequence[str],
    tasks: Sequence[str],
    caption: str,
    notes: Sequence[str],
) -> Group:
    """Mean and standard error over scenes, the paper's figure beside, and the notes below."""
    table = Table(title="the paper's protocol", caption=caption, title_justify="left")
    for name in ("data set", "task", "figure"):
        table.add_column(name, no_wrap=True)
    for name in ("measured", "scenes", "published", "where"):
        table.add_column(name, justify="right", no_wrap=True)
    for dataset in datasets:
        for task in tasks:
            for name in figures_of(task, DATA_SETS[dataset].geometry):
                _add(table, dataset, task, name, measured(rows, dataset, task, name))
            table.add_section()
    return Group(table, *(Text(f"note: {note}") for note in notes))


def _add(table: Table, dataset: str, task: str, name: str, values: Sequence[float]) -> None:
    figure = FIGURES[name]
    text = "not measured"
    if values:
        mean, error = mean_and_error(values)
        text = f"{mean:.{figure.digits}f}"
        text += "" if math.isnan(error) else f" ± {error:.{figure.digits}f}"
    published, where = PUBLISHED.get((dataset, task, name), (None, ""))
    table.add_row(
        DATA_SETS[dataset].title,
        task,
        f"{figure.title} {'↑' if figure.more else '↓'}",
        text,
        str(len(values)),
        "not found" if published is None else f"{published:.{figure.digits}f}",
        where,
    )


def show(group: Group) -> None:
    """Print on the output stream; a pipe gets lines that are wide enough."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(group)
