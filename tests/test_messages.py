"""Every error message in the source has one of a few forms, which say what to change."""

import ast
import re
from pathlib import Path

import pytest

import jgd

FORMS = {
    "a value": r"must .*, got ",  # "adam: b1 must be in [0, 1), got 2.0"
    "a type": r"expected .*, got ",
    "a condition without a value": r"must (not be given with|not report|be|have|give) ",
    "an unknown name": r"(has no|no [\w-]+ named|no [\w-]+ has an) ",
    "something that is needed": r"\bneeds\b",
    "nothing that matches": r"^no parameter (that )?matches",
    "a number assigned to": r"is immutable",
    "a file": r"(is damaged|was changed|is missing|is in use|is not empty|is intact|exists"
    r"|was extended|ended after|holds? (no|a|another) |belongs to|is not the journal"
    r"|is not stored)",
    "what to do next": r"([Rr]esume (the sweep|(it |from it )?with)|[Ff]inish .* first)",
}
OWN_WORDS = re.compile(r"(\w{3,}\W+){3}")  # fewer only stand in front of another message
# These take their message from another function.
PASSED_ON = {
    "SystemExit",
    "Interrupted",
    "_Mismatch",
    "wrong_state",
    "shape_error",
    "_cycle_momentum_error",
}
DIALECT = r"\b(wanted|begun|told|goes on|whole|keeps no|here)\b"


def _text(node):
    """Return a message as its source spells it, with `{}` for what is filled in."""
    match node:
        case ast.Constant():
            return str(node.value)
        case ast.JoinedStr():
            return "".join(map(_text, node.values))
        case ast.BinOp():
            return _text(node.left) + _text(node.right)
    return "{}"


def _messages():
    root = Path(jgd.__file__).parent
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                kind = ast.unparse(node.exc.func)
                text = _text(node.exc.args[0])
                where = f"{path.relative_to(root)}:{node.lineno}"
                if OWN_WORDS.search(text.replace("{}", "") + " ") and kind not in PASSED_ON:
                    yield pytest.param(text, id=where)


MESSAGES = list(_messages())


def test_messages_are_collected():
    assert len(MESSAGES) > 150


@pytest.mark.parametrize("text", MESSAGES)
def test_a_message_has_a_known_form(text):
    assert any(re.search(form, text, re.DOTALL) for form in FORMS.values())


@pytest.mark.parametrize("text", MESSAGES)
def test_a_message_is_one_line_of_plain_english(text):
    assert "\n" not in text
    assert not re.search(DIALECT, text)
