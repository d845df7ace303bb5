"""Renders an HTML table from a template: many small strings, joined, escaped and hashed."""

import hashlib
import html
import string

ROWS = 60
COLUMNS = 12

PAGE = string.Template(
    "<html><head><title>$title</title></head><body><table>\n$rows</table></body></html>\n"
)
ROW = string.Template('<tr class="$kind">$cells</tr>\n')
CELL = string.Template('<td id="$row-$column">$content</td>')


def cell(text, row, column):
    content = html.escape(f"<{text}> {row * column + len(text)} & {chr(97 + column)}")
    return CELL.substitute(row=row, column=column, content=content)


def answer(text):
    rows = []
    for row in range(ROWS):
        cells = "".join(cell(text, row, column) for column in range(COLUMNS))
        rows.append(ROW.substitute(kind="odd" if row % 2 else "even", cells=cells))
    page = PAGE.substitute(title=html.escape(text), rows="".join(rows)).encode()
    return {"bytes": len(page), "checksum": hashlib.sha256(page).hexdigest()}
