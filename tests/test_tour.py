"""docs/tour.md quotes the code as it is; its notebook is the same; figures are short; what it says of them is so."""

import ast
import json
import sys
from pathlib import Path

import pytest
from matplotlib.axis import Tick
from matplotlib.text import Text

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "experiments"))

import tour  # noqa: E402

PAGE = tour.PAGE.read_text()


def test_quotes_and_notebook_are_those_of_the_present_files():
    assert PAGE.count("<!-- quote ") == PAGE.count("```python\n# ") >= 7
    assert tour.with_quotes(PAGE) == PAGE, "python experiments/tour.py --text"
    assert json.loads(tour.NOTEBOOK.read_text()) == tour.notebook(PAGE), "python experiments/tour.py --text"
    changed = PAGE.replace("clamp(0, 1)", "clamp(0, 2)")
    assert changed != PAGE and tour.with_quotes(changed) == PAGE
    for block in PAGE.split("```python\n")[1:]:
        place, *code = block.split("```")[0].splitlines()
        file, line = place.removeprefix("# ").split(", line ")
        assert code[0].strip() == (ROOT / file).read_text().splitlines()[int(line) - 1].strip()


def test_a_chapter_is_short_and_whole():
    assert len(PAGE.split()) <= 1800
    chapters = PAGE.split("\n## ")[1:]
    assert len(chapters) == len(tour.FIGURES) == 7
    for chapter, figure in zip(chapters, tour.FIGURES):
        assert f"](tour/{figure.__name__}.png)" in chapter
        assert all(part in chapter for part in ("**", "<!-- quote ", "*Look for:*", "*Exercise:*", "*Answer:*"))
    functions = ast.parse(Path(tour.__file__).read_text()).body
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in functions if isinstance(f, ast.FunctionDef)}
    assert all(lengths[figure.__name__] <= 40 for figure in tour.FIGURES)


def test_the_notebook_has_a_cell_for_each_figure():
    cells = tour.notebook(PAGE)["cells"]
    code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    assert code[1:] == [f"tour.{figure.__name__}()" for figure in tour.FIGURES]
    ast.parse(code[0].removeprefix("%matplotlib inline"))
    assert not any("<!--" in cell["source"] for cell in cells)


@pytest.mark.parametrize("make", [tour.ball, tour.gained])
def test_figures_are_legible_on_a_page(make):
    fig = make()
    fig.draw_without_rendering()
    shown = [t for t in fig.findobj(Text) if t.get_text().strip() and t.get_visible()]
    page = 838 / 96  # inches: a page of GitHub
    assert shown and min(t.get_fontsize() for t in shown) * min(1, page / fig.get_figwidth()) >= 12
    ticks = [text for tick in fig.findobj(Tick) for text in tick.findobj(Text)]  # some are outside, and not drawn
    for text in set(shown) - set(ticks):  # nothing is cut off at an edge
        box = text.get_window_extent()
        assert min(box.x0, box.y0, fig.bbox.x1 - box.x1, fig.bbox.y1 - box.y1) > -3, text  # pixels
