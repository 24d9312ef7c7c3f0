"""The summaries as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from certify.report.summary import Summary, bound_text, measures_text, notes, percent, plain, radius_label, radius_text

NARROWEST = 8  # columns for a name; longer ones take several lines

Column = tuple[str, ...]  # the header, then one cell per run


def print_table(summaries: Sequence[Summary], radii: Sequence[float], console: Console) -> None:
    """One row per run, one column per radius, and below it what has to be known beside the numbers. Too wide a table becomes two: no number is cut."""
    names, guarantees, *numbers = _columns(summaries, radii)
    room = console.width - NARROWEST - 1 - _width(guarantees)
    for columns in _packed(numbers, room):
        console.print(_table(names, [guarantees, *columns], console.width))
    measures = plain(measures_text(summary.norm for summary in summaries))
    console.print(Text(f"Under r=...: share of all inputs classified right and certified beyond that radius ({measures})."))
    for note in notes(summaries):
        console.print(Text(f"! {plain(note)}"))


def _columns(summaries: Sequence[Summary], radii: Sequence[float]) -> list[Column]:
    return [
        ("run", *(plain(summary.name) for summary in summaries)),
        ("guarantee", *(plain(summary.guarantee) for summary in summaries)),
        ("clean", *(percent(summary.clean) for summary in summaries)),
        *((f"r={radius_label(radius)}", *(percent(summary.certified[place], summary.attacked) for summary in summaries)) for place, radius in enumerate(radii)),
        ("median r", *(radius_text(summary.median_radius, summary.attacked) for summary in summaries)),
        ("Lipschitz", *(bound_text(summary.bound) for summary in summaries)),
    ]


def _packed(columns: Sequence[Column], room: int) -> list[list[Column]]:
    """The columns in as few groups as fit into the room, in order. Every group has at least one."""
    groups: list[list[Column]] = [[]]
    for column in columns:
        if groups[-1] and sum(1 + _width(each) for each in (*groups[-1], column)) > room:
            groups.append([])
        groups[-1].append(column)
    return groups


def _table(names: Column, columns: Sequence[Column], width: int) -> Table:
    """The names take what the other columns leave."""
    left = width - sum(1 + _width(column) for column in columns)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 0), header_style="bold")
    table.add_column(names[0], width=min(_width(names), max(left, NARROWEST)), overflow="fold")
    for place, column in enumerate(columns):
        table.add_column(column[0], width=_width(column), justify="left" if place == 0 else "right")
    for cells in list(zip(names, *columns, strict=True))[1:]:
        table.add_row(*map(Text, cells))
    return table


def _width(column: Column) -> int:
    return max(map(cell_len, column))
