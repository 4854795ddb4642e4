"""Conversion of docstring formulas to LaTeX: `latex("u = -a g / (sqrt(v) + eps)")`.

A block has statements `target <- expression, words`, one or several on a line. Products need no
sign, and `/` divides the whole product before it: `a b / c d` is a b d / c. Angle brackets are an
inner product, `m^` is a hat and `d'` a prime. Words after a comma become text.
"""

import re

__all__ = ["latex"]

TOKEN = re.compile(
    r"(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?\b)|(?P<name>[A-Za-z](?:\w*[^\W_])?)"
    r"|(?P<sign>\|\||[-+/^_()|<>,'])|(?P<space>\s+)"
)
GREEK = ("alpha", "beta", "gamma", "epsilon", "eta", "rho")
WORDS = re.compile(
    r"\b(of|the|and|or|with|for|if|by|at|where|as|on|after|in|not|is|its|their|over)\b|[:.](?!\d)"
)


class _Unknown(ValueError):
    """Raised for a statement that is not a formula."""


def latex(block: str) -> str | None:
    """Return an indented block as a LaTeX `aligned`, or None if a statement is not a formula."""
    rows = []
    for line in filter(str.strip, block.splitlines()):
        try:
            rows.append(r" \qquad ".join(map(_statement, re.split(" {3,}|; ", line.strip()))))
        except _Unknown:
            return None
    body = " \\\\[6pt]\n".join(f"& {row}" for row in rows)
    return f"\\begin{{aligned}}\n{body}\n\\end{{aligned}}"


def _statement(text: str) -> str:
    """Return `target <- expression, words` as LaTeX; words without a target become text."""
    found = re.match(r"([^=]*?)\s+(<-|=)\s+(.*)", text)
    if not found:
        return _words(text)
    targets = ", ".join(_expression(target) for target in found[1].split(", "))
    arrow = r"\leftarrow" if found[2] == "<-" else "="
    *equal, last = found[3].split(" = ") if "," not in found[3] else [found[3]]
    return f"{targets} {arrow} {' = '.join([*map(_expression, equal), _right_side(last)])}"


def _right_side(text: str) -> str:
    """Return an expression with the words after its first comma outside brackets, if any."""
    depth = 0
    for index, sign in enumerate(text):
        depth += (sign in "(<") - (sign in ")>")
        if depth == 0 and (text.startswith(", ", index) or WORDS.match(text, index)):
            break
    else:
        return _expression(text)
    if not text.startswith(",", index):  # words without a comma, as in "averages of g^2"
        words, *statements = re.split(r", (?=\w+ (?:=|<-) )", text)
        return r", \quad ".join([_words(words), *map(_statement, statements)])
    rest = text[index + 2 :]
    after = _statement(rest) if re.match(r"\w+ (=|<-) ", rest) else _words(rest)
    return rf"{_expression(text[:index])}, \quad {after}"


def _words(text: str) -> str:
    return rf"\text{{{text}}}"  # MathJax shows ^ and _ in \text unchanged


def _expression(text: str) -> str:
    parser = _Parser(text)
    result = parser.sum()
    if parser.kind:
        raise _Unknown(text)
    return result


class _Parser:
    """Recursive descent parser whose methods each read a part of a formula and return its LaTeX.

    `kind`, `value` and `spaced` (whether a space precedes it) describe the next token.
    """

    def __init__(self, text: str) -> None:
        self.text, self.end = text, 0
        self.next()

    def next(self) -> str:
        """Return the current token and read the next one."""
        value, self.spaced = getattr(self, "value", ""), False
        self.kind, self.value = "", ""
        while self.end < len(self.text):
            found = TOKEN.match(self.text, self.end)
            if not found:
                raise _Unknown(self.text)
            self.end = found.end()
            if found.lastgroup != "space":
                self.kind, self.value = str(found.lastgroup), found[0]
                break
            self.spaced = True
        return value

    def take(self, value: str) -> None:
        """Read a token that must have this value."""
        if self.value != value:
            raise _Unknown(self.text)
        self.next()

    def sum(self) -> str:
        result = self.product()
        while self.value in ("+", "-"):
            result += f" {self.next()} {self.product()}"
        return result

    def product(self) -> str:
        sign = self.next() if self.value == "-" else ""
        result = self.factor()
        while self.kind in ("number", "name") or self.value in ("/", "(", "|", "||", "<"):
            if self.value == self.closing:
                break
            if self.value == "/":
                self.next()
                result = rf"\frac{{{_bare(result)}}}{{{_bare(self.factor())}}}"
            else:
                result += rf" \, {self.factor()}"
        return sign + result

    def factor(self) -> str:
        """Return a power; a fraction needs no parentheses."""
        result = self.power()
        return (
            _bare(result)
            if result.startswith(r"\left(\frac") and _is_fraction(_bare(result))
            else result
        )

    def power(self) -> str:
        result = self.atom()
        while self.value == "'":
            result += self.next()
        if self.value == "_":  # "d_(t + 1)"; other indices belong to the name
            self.next()
            result += f"_{{{_bare(self.atom())}}}"
        if self.value != "^":
            return result
        at = self.end
        if not self.text[at : at + 1].strip(" ),/"):  # no exponent: a hat
            self.next()
            head, *index = result.split("_", 1)
            return "_".join([rf"\hat{{{head}}}", *index])
        self.next()
        if self.value == "(":
            return f"{result}^{{{_exponent(_bare(self.atom()))}}}"
        sign = self.next() if self.value == "-" else ""
        return f"{result}^{{{sign}{self.atom()}}}"

    closing = ""  # the bar that closes the innermost open norm

    def atom(self) -> str:
        if self.kind == "number":
            return re.sub(r"^1e(-?)0*(\d+)$", r"10^{\1\2}", self.next())
        if self.kind == "name":
            name = self.next()
            if self.value == "(" and not self.spaced:
                return self.call(name)
            if name in ("max", "min"):  # without parentheses, of the next power
                return rf"\{name} {self.power()}"
            return _name(name)
        if self.value == "(":
            self.next()
            outside, self.closing = self.closing, ""
            result = self.sum()
            self.take(")")
            self.closing = outside
            return rf"\left({result}\right)"
        if self.value in ("|", "||"):
            bar, outside = self.next(), self.closing
            self.closing = bar
            result = self.sum()
            self.closing = outside
            # "|g|_1": the index of the norm belongs to the bar
            found = re.match(r"_(\w+)", self.text[self.end :])
            if found and self.value == bar:
                self.end += found.end()
            self.take(bar)
            side = r"\|" if bar == "||" else "|"
            return rf"\left{side} {result} \right{side}" + (f"_{{{found[1]}}}" if found else "")
        if self.value == "<":
            self.next()
            left = self.sum()
            self.take(",")
            right = self.sum()
            self.take(">")
            return rf"\left\langle {left},\, {right} \right\rangle"
        raise _Unknown(self.text)

    def call(self, name: str) -> str:
        self.next()
        outside, self.closing = self.closing, ""
        arguments = [self.sum()]
        while self.value == ",":
            self.next()
            arguments.append(self.sum())
        self.take(")")
        self.closing = outside
        inside = ",\\, ".join(arguments)
        if name in ("sqrt", "cbrt"):
            return rf"\sqrt{'[3]' if name == 'cbrt' else ''}{{{inside}}}"
        if len(name) == 1:
            return rf"{name}\left({inside}\right)"
        head = rf"\{name}" if name in ("max", "min") else rf"\operatorname{{{name}}}"
        return rf"{head}\left({inside}\right)"


def _inside(text: str, opening: str, closing: str) -> str | None:
    """Return the text between two brackets that enclose all of `text`, else None."""
    if not (text.startswith(opening) and text.endswith(closing)):
        return None
    inside, depth = text[len(opening) : -len(closing)], 0
    for found in re.finditer(f"{re.escape(opening)}|{re.escape(closing)}", inside):
        depth += 1 if found[0] == opening else -1
        if depth < 0:
            return None
    return inside


def _bare(factor: str) -> str:
    """Return a factor without the parentheses around all of it."""
    inside = _inside(factor, r"\left(", r"\right)")
    return factor if inside is None else inside


def _is_fraction(text: str) -> bool:
    """Return whether `text` is one fraction and nothing else."""
    depth, groups = 0, 0
    for index, sign in enumerate(text):
        depth += (sign == "{") - (sign == "}")
        groups += sign == "}" and depth == 0
        if groups == 2:
            return index == len(text) - 1
    return False


def _exponent(text: str) -> str:
    """Return an exponent, with a simple fraction on one line."""
    return re.sub(r"^(-?)\\frac\{(\w+)\}\{(\w+)\}$", r"\1\2/\3", text)


def _index(name: str, index: str) -> str:
    index = {"inf": r"\infty"}.get(index, index if len(index) == 1 else rf"\mathrm{{{index}}}")
    return f"{name}_{{{index}}}"


def _name(name: str) -> str:
    """Return a variable: `b1`, `m2` and `g_old` have an index, `learning_rate` is upright."""
    if found := re.fullmatch(r"([A-Za-z])(\d)", name):
        return _index(r"\beta" if found[1] == "b" else found[1], found[2])
    if found := re.fullmatch(r"([A-Za-z])_([A-Za-z]+)", name):
        return _index(*found.groups())
    if found := re.fullmatch(r"(beta|epsilon)_(\d)", name):  # as Keras spells them
        return _index(rf"\{found[1]}", found[2])
    if name in GREEK:
        return rf"\{name}"
    if name == "eps":
        return r"\epsilon"
    return name if len(name) == 1 else rf"\mathrm{{{name}}}".replace("_", r"\_")
