"""The site's pages, generated from docstrings, have correct formulas, sections and pictures."""

import inspect
import re
import sys
from pathlib import Path

import pytest

import jgd
from jgd import catalog

DOCS = Path(jgd.__file__).parent.parent / "docs"
sys.path.insert(0, str(DOCS))

import formulas  # noqa: E402
import pages  # noqa: E402

FORMULAS = {
    "v <- b2 v + (1 - b2) g": r"v \leftarrow \beta_{2} \, v + \left(1 - \beta_{2}\right) \, g",
    "u = a b / (c + eps) d": r"u = \frac{a \, b}{c + \epsilon} \, d",
    "u = (a / b) / c": r"u = \frac{\frac{a}{b}}{c}",
    "u = (a / b)^2 - x": r"u = \left(\frac{a}{b}\right)^{2} - x",
    "u = -m^ / sqrt(v^ + eps_root)": r"u = -\frac{\hat{m}}{\sqrt{\hat{v} + \mathrm{eps\_root}}}",
    "d' = max(d, |s|_1 / ||g||^2)": r"d' = \max\left(d,\, \frac{\left| s \right|_{1}}"
    r"{\left\| g \right\|^{2}}\right)",
    "r = <g, p0 - p>, at first": r"r = \left\langle g,\, p_{0} - p \right\rangle, "
    r"\quad \text{at first}",
    "H = L^(-1/4) N(0, 1e-08)": r"H = L^{-1/4} \, N\left(0,\, 10^{-8}\right)",
    "u = v = d_(t+1) m": r"u = v = d_{t + 1} \, m",
    "u = beta_1 epsilon": r"u = \beta_{1} \, \epsilon",
    "u = (a": None,
    "u = a # b": None,
}


@pytest.mark.parametrize("formula", FORMULAS)
def test_formulas_become_latex(formula):
    expected = FORMULAS[formula]
    if expected is not None:
        expected = f"\\begin{{aligned}}\n& {expected}\n\\end{{aligned}}"
    assert formulas.latex(formula) == expected


MARKUP = re.compile(
    r"\[6pt\]|\\(begin|end)\{aligned\}|\\(left|right|frac|mathrm|operatorname|hat|text)(?![a-z])"
    r"|\\(leftarrow|quad|qquad|langle|rangle)|[^A-Za-z0-9]"
)


def test_the_formula_of_every_optimizer_becomes_latex():
    """The LaTeX has the letters and digits of the formula in their order, fractions included."""
    for entry in catalog.entries():
        block = re.search(r"\n\n((?: {4}.+\n)+)", inspect.getdoc(jgd.get(entry.name)))[1]
        math = formulas.latex(block)
        assert math is not None, entry.name
        assert math.count("{") == math.count("}"), entry.name
        assert math.count(r"\left") - math.count(r"\leftarrow") == math.count(r"\right"), entry.name
        for name, symbol in (("1e-", "10"), ("cbrt", "sqrt3"), ("l_inf", "linfty")):
            block = block.replace(name, symbol)
        for name, symbol in ((r"\bb(\d)", r"beta\1"), (r"\beps(?![\w\\])", "epsilon")):
            block, math = re.sub(name, symbol, block), re.sub(name, symbol, math)
        assert re.sub(r"[^A-Za-z0-9]", "", block) == MARKUP.sub("", math), entry.name


def test_sections_become_fields():
    text = """Adam: descend.

        u = -learning_rate m

    Args:
      learning_rate: the step, in [0, 1);
        a float. As `nadam`.
      b1, b2: decays.

    State: `S(mu)`,
      one tree.
    Differs from: `optax.adam`.
    Source: Kingma & Ba 2015, arXiv:1412.6980.
    """
    shown = pages.markdown(text)
    assert "```{math}\n\\begin{aligned}\n& u = -\\mathrm{learning\\_rate} \\, m" in shown
    listed = (
        "- `learning_rate`: the step, in \\[0, 1);\n      a float. As {py:obj}`nadam <jgd.nadam>`."
    )
    assert f":Args:\n    {listed}\n    - `b1`, `b2`: decays.\n" in shown
    assert ":State:\n    `S(mu)`,\n    one tree.\n" in shown
    assert ":Differs from:\n    `optax.adam`.\n" in shown
    assert shown.endswith("2015, [arXiv:1412.6980](https://arxiv.org/abs/1412.6980).")


def test_names_of_jgd_and_of_a_module_link_to_their_own_pages():
    linked = pages.markdown("`jgd.adam` and `adam`", "jgd.compat.torch")
    assert linked == ("{py:obj}`jgd.adam <jgd.adam>` and {py:obj}`adam <jgd.compat.torch.adam>`")


def test_every_section_of_a_public_docstring_is_a_field():
    for name in jgd.__all__:
        text = inspect.getdoc(getattr(jgd, name))
        heads = re.findall(r"^(Args|State|Raises|Returns|Differs from|Source)\b.*:", text, re.M)
        assert len(re.findall(r"^:[A-Z]", pages.markdown(text), re.M)) >= len(heads), name


def test_each_optimizer_has_a_picture():
    """`python docs/trajectories.py` draws the pictures."""
    pictures = {path.stem for path in (DOCS / "_static" / "trajectories").iterdir()}
    assert pictures == {entry.name for entry in catalog.entries()}


def test_each_optimizer_of_jgd_has_a_row_in_the_comparison():
    head, rows = pages._comparison()
    assert {entry.name for entry in catalog.entries() if entry.own} == set(rows)
    assert all(len(row) == len(head) for row in rows.values())
