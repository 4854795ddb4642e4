"""Pages generated from the code: `write(folder)` writes them as Markdown.

    reference/jgd.schedules.md      a module: its docstring and those of its public names
    optimizers/adam.md              an optimizer: docstring, trajectory, numbers, comparison
    notebooks/...                   copies of the notebooks

A docstring consists of a summary, paragraphs, indented blocks (Python or formulas) and sections
(Args, State, Raises, Differs from, Source). Sections become fields.
"""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from formulas import latex

import jgd
from jgd import catalog

__all__ = ["markdown", "write"]

ROOT = Path(jgd.__file__).parent.parent
MORE = {  # public modules with names that `jgd` does not export; empty: all names of the module
    "jgd.compat.keras": "",
    "jgd.compat.torch": "",
    "jgd.compat.textbook": "",
    "jgd.compat.optax": "",
    "jgd.regularization": "",
    "jgd.stopping": "",
    "jgd.nnx": "",
    "jgd.diagnosis": "",
    "jgd.tuning.result": "Result Best",
}
SECTION = re.compile(
    r"(Args|State|Raises|Returns|Yields|Differs from|Source)((?:,? (?:and )?[a-z]+)*): *(.*)",
    re.IGNORECASE,
)


# --- a docstring -----------------------------------------------------------------------------


def markdown(text: str, module: str = "jgd") -> str:
    """Return a docstring as MyST Markdown, in which names in backticks become links."""
    parts: list[str] = []
    lines = [*inspect.cleandoc(text).splitlines(), ""]
    while lines:
        if found := SECTION.fullmatch(lines[0]):
            body = [found[3], *_section(lines)]
            parts.append(_field(found[1] + found[2], body, module))
        elif lines[0].startswith("    "):
            parts.append(_block(textwrap.dedent("\n".join(_take(lines, "    ")))))
        elif lines[0].strip():
            paragraph = "\n".join(_take(lines, ""))
            if _is_code(paragraph):  # cleandoc removed the indentation: only code follows
                parts.append(_block(paragraph))
            elif "\n    " in paragraph:  # a table in columns
                parts.append(f"```text\n{paragraph}\n```")
            else:
                parts.append(_prose(paragraph, module))
        else:
            lines.pop(0)
    return "\n\n".join(parts)


def _take(lines: list[str], indent: str) -> list[str]:
    """Remove and return the lines of a paragraph or of an indented block, with its empty lines."""
    taken = [lines.pop(0)]
    while lines and not SECTION.fullmatch(lines[0]):
        following = lines[0] if lines[0].strip() or not indent else _next(lines)
        if not following.strip() or not following.startswith(indent):
            break
        taken.append(lines.pop(0))
    return taken


def _next(lines: list[str]) -> str:
    """Return the next line that is not empty."""
    return next((line for line in lines if line.strip()), "")


def _section(lines: list[str]) -> list[str]:
    """Remove the head of a section and return its other lines, up to the next one."""
    lines.pop(0)
    body: list[str] = []
    while lines and not SECTION.fullmatch(lines[0]):
        if not lines[0].strip() and not _next(lines).startswith("  "):
            break
        body.append(lines.pop(0))
    return body


def _field(title: str, body: list[str], module: str) -> str:
    """Return a section as a field, in which entries `name: text` become a list."""
    first, rest = body[0], textwrap.dedent("\n".join(body[1:])).splitlines()
    entries: list[list[str]] = []
    for line in rest:
        if found := re.match(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*): (.*)", line):
            entries.append([", ".join(f"`{name}`" for name in found[1].split(", ")), found[2]])
        elif entries:
            entries[-1][1] += "\n" + line.strip()
        else:
            first += "\n" + line.strip()
    items = [f"- {names}: {_prose(text, module)}".replace("\n", "\n  ") for names, text in entries]
    content = "\n".join(filter(None, [_prose(first, module) if first.strip() else "", *items]))
    return f":{title}:\n{textwrap.indent(content, '    ')}"


def _prose(text: str, module: str) -> str:
    """Escape the markup of Markdown in a text, and link names and papers."""
    parts = re.split(r"(`[^`]*`)", text.strip())
    return "".join(_code(p, module) if p.startswith("`") else _plain(p) for p in parts)


def _plain(text: str) -> str:
    text = re.sub(r"([*<\[\]$|])", r"\\\1", text)
    text = re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
    text = re.sub(r"doi:(10\.\S+?)(?=[;,.)]*(?:\s|$))", r"[doi:\1](https://doi.org/\1)", text)
    return re.sub(r"(?<!\()(https://(?!arxiv|doi)\S+?)(?=[;,.)]*(?:\s|$))", r"<\1>", text)


def _code(text: str, module: str) -> str:
    """Return a text in backticks as a link if it is a name of `module` or, with "jgd.", of jgd."""
    shown = text.strip("`")
    name = shown.removeprefix("jgd.")
    if module != "jgd" and shown in _names(module):
        return f"{{py:obj}}`{shown} <{module}.{shown}>`"
    return f"{{py:obj}}`{shown} <jgd.{name}>`" if name in jgd.__all__ else text


def _block(text: str) -> str:
    """Return an indented block as Python, as a formula or as plain text."""
    if _is_code(text):
        return f"```python\n{text}\n```"
    formula = latex(text) if re.search(r"<-|=", text) else None
    return f"```{{math}}\n{formula}\n```" if formula else f"```text\n{text}\n```"


def _is_code(text: str) -> bool:
    """Return whether a text is Python with a call in it, and not a formula."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return False
    calls = any(isinstance(node, ast.Call) for node in ast.walk(tree))
    return calls and not re.search(r"<-|^u +=", text, re.MULTILINE)


# --- a name ----------------------------------------------------------------------------------


def _names(module: str) -> list[str]:
    """Return the public names of a module."""
    listed = MORE.get(module) or " ".join(jgd._MODULES.get(module, "").split())
    if listed:
        return listed.split()
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", None) or [n for n in vars(loaded) if n[0] != "_"]
    return sorted(n for n in names if callable(getattr(loaded, n)))


def _signature(value: Any) -> str:
    """Return the signature without annotations, which the docstring states in words."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return "()"
    parameters = [_parameter(p) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def _parameter(parameter: inspect.Parameter) -> inspect.Parameter:
    default = parameter.default
    if default is not parameter.empty:
        try:
            ast.parse(repr(default))
        except SyntaxError:
            default = ...
    return parameter.replace(annotation=parameter.empty, default=default)


def _entry(module: str, name: str, value: Any) -> str:
    """Return the directive of a function or a class, with its fields and methods."""
    kind = "class" if isinstance(value, type) else "function"
    parts = [markdown(inspect.getdoc(value) or "", module)]
    if isinstance(value, type):
        parts += [*_fields(value, module)]
        for method, function in vars(value).items():
            if method[0] != "_" and inspect.isfunction(function) and inspect.getdoc(function):
                body = markdown(inspect.getdoc(function) or "", module)
                signature = re.sub(r"^\(self(, )?", "(", _signature(function))
                parts.append(f"`````{{py:method}} {method}{signature}\n\n{body}\n`````")
    body = "\n\n".join(parts)
    return f"``````{{py:{kind}}} {module}.{name}{_signature(value)}\n\n{body}\n``````"


def _fields(value: type, module: str) -> Iterator[str]:
    """Yield a list of the annotated fields, each with the comment or the string beside it."""
    source = textwrap.dedent(inspect.getsource(value))
    lines, tree = source.splitlines(), ast.parse(source).body[0]
    assert isinstance(tree, ast.ClassDef)
    items = []
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            text = lines[node.lineno - 1].partition("  # ")[2]
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                text = re.sub(r"\s+", " ", str(after.value.value))
            items.append(
                f"- `{ast.unparse(node.target)}`" + (f": {_prose(text, module)}" if text else "")
            )
    if items:
        yield f":Fields:\n{textwrap.indent(chr(10).join(items), '    ')}"


# --- pages -----------------------------------------------------------------------------------


def _module_page(module: str, optimizers: list[str]) -> str:
    loaded = importlib.import_module(module)
    home = module if module in MORE else "jgd"
    parts = [f"# {module}", markdown(loaded.__doc__ or "", home)]
    for name in _names(module):
        if module not in MORE and name in optimizers:
            parts.append(f"`jgd.{name}` has [a page of its own](../optimizers/{name}.md).")
        else:
            parts.append(_entry(home, name, getattr(loaded, name)))
    return "\n\n".join(parts) + "\n"


def _optimizer_page(entry: catalog.Entry, rows: dict[str, list[str]], head: list[str]) -> str:
    factory = catalog.get(entry.name)
    parameters = inspect.signature(factory).parameters
    parts = [f"# {entry.name}", _entry("jgd", entry.name, factory)]
    if not entry.own:
        parts.append("The formula is optax's; jgd lifts it, so that its numbers are leaves.")
    parts += ["## Numbers", "| number | default | range |\n| --- | --- | --- |"]
    for name, default in entry.numbers.items():
        kinds = [getattr(kind, "description", "") for kind in get_args(parameters[name].annotation)]
        shown = "" if default is ... else f"`{default!r}`"
        parts[-1] += f"\n| `{name}` | {shown} | {next(filter(None, kinds), '')} |"
    parts += ["Each number is a leaf: a new value does not retrace, and batched values make lanes."]
    parts += [
        "## State",
        f"The state of a 1024 x 1024 matrix is {entry.trees:g} times as large as the matrix.",
    ]
    picture = f"_static/trajectories/{entry.name}.svg"
    if (ROOT / "docs" / picture).exists():
        alt = f"The path of {entry.name} over an ellipse-shaped valley"
        parts += ["## Trajectory", f"![{alt}](/{picture}){{.trajectory}}"]
        parts += [
            "The path of 50 steps on [a badly scaled quadratic](../optimizers.md#trajectories)."
        ]
    if entry.name in rows:
        cells = "\n".join(f"| {h} | {c} |" for h, c in zip(head, rows[entry.name], strict=True))
        parts += ["## Comparison", f"| | {entry.name} |\n| --- | --- |\n{cells}"]
        parts += [f"All {len(rows)} optimizers are in [the benchmarks](../benchmarks.md)."]
    return "\n\n".join(parts) + "\n"


def _comparison() -> tuple[list[str], dict[str, list[str]]]:
    """Return the head of the first comparison table, and its rows by optimizer."""
    text = (ROOT / "benchmarks" / "README.md").read_text()
    table = text.partition("<!-- comparison: begin -->")[2].strip().partition("\n\n")[0]
    head, _, *rows = [[c.strip() for c in row.strip("| ").split("|")] for row in table.splitlines()]
    head = [h for h in head if h]
    by_name = {row[1].strip("`"): [row[0], *row[2:]] for row in rows}
    return ["place", *head[1:]], by_name


def write(folder: Path) -> None:
    """Write the pages under `folder` and delete old ones. Unchanged files are not touched."""
    entries = catalog.entries()
    names = [entry.name for entry in entries]
    head, rows = _comparison()
    pages = {f"optimizers/{e.name}.md": _optimizer_page(e, rows, head) for e in entries}
    for module in [*jgd._MODULES, *MORE]:
        pages[f"reference/{module}.md"] = _module_page(module, names)
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        pages[f"notebooks/{notebook.name}"] = notebook.read_text().replace(
            "](../README.md", "](../index.md"
        )
    for part in ("optimizers", "reference", "notebooks"):
        (folder / part).mkdir(exist_ok=True)
        for old in (folder / part).iterdir():
            if f"{part}/{old.name}" not in pages:
                old.unlink()
    for name, text in pages.items():
        if not (folder / name).exists() or (folder / name).read_text() != text:
            (folder / name).write_text(text)
