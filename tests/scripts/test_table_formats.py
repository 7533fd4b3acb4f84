"""The parts of tables: tests as they are shown, Holm's correction, LaTeX, and how rows look in a figure."""

import json

import pytest

from scripts import table_cells, table_figures, table_tests
from scripts.compare_table import interval
from scripts.table_formats import _show_test, latex, to_csv, to_json


def test_rows_of_a_figure_look_different(tmp_path):
    rows = [table_cells.Row(f"m{i}", "sira", (), {}) for i in range(20)]
    assert len(set(table_figures._looks(rows).values())) == 20


@pytest.mark.parametrize(("p", "text"), [(1e-15, "p<1e-12"), (0.04, "p=0.04")])
def test_p_is_never_shown_as_zero(p, text):
    test = table_tests.Test("a", "b", "c", interval([1.0, 2.0, 3.0]), p, p)
    assert _show_test(test, "higher").endswith(f"(n=3, {text})")


def test_holm():
    assert table_tests.holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert table_tests.holm([0.5, 0.9]) == [1.0, 1.0]
    assert table_tests.holm([]) == []


def test_latex_escapes():
    assert latex(r"a_b & 5% ± #1 {x} ~^ \q $") == (
        r"a\_b \& 5\% $\pm$ \#1 \{x\} \textasciitilde{}\textasciicircum{} \textbackslash{}q \$"
    )
    assert latex("[1] x") == "{}[1] x"
    assert latex("a|b → c ≤ −1") == r"a\textbar{}b $\to$ c $\leq$ $-$1"
    assert latex("-1.5 and cldr-date") == "$-$1.5 and cldr-date"


def test_a_table_without_columns_has_its_header():
    """When no run of it is finished."""
    empty = table_cells.Grid("t", "u", "higher", "test", (), ())
    assert to_csv([empty]).startswith("table,unit,row,method,trained_share_percent,column,mean,")
    assert to_csv([empty]).count("\n") == 1
    assert json.loads(to_json([empty])) == []
