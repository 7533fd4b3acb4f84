"""Rows of numbers as text."""


def format_rows(rows: list[dict]) -> str:
    """The rows as an aligned table."""
    columns = list(rows[0])

    def text(value) -> str:
        if isinstance(value, float):
            return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
        return "" if value is None else str(value)

    cells = [columns, *([text(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(lines)
