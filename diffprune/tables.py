"""Tables for a terminal of 80 columns."""

from rich import box
from rich.table import Table
from rich.text import Text

from diffprune.endings import spelled


def table(*headers: str, right: range) -> Table:
    """Without a frame; the columns of numbers, `right`, are aligned there and never broken."""
    made = Table(*headers, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(made.columns):
        column.overflow = "fold"
        if index in right:
            column.justify, column.no_wrap = "right", True
    return made


def add_row(to: Table, *cells: str) -> None:
    """As Text, because rich takes a bracket in a plain string for markup."""
    to.add_row(*(Text(spelled(cell)) for cell in cells))
