"""A table as Markdown and as LaTeX: a title, a heading, and lines; the first columns are words, the others numbers."""

from __future__ import annotations

from collections.abc import Sequence

_ESCAPES = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "±": r"$\pm$"}
_ESCAPES |= {character: "\\" + character for character in "&%$#_{}"}


def markdown(title: str, heading: Sequence[str], lines: Sequence[Sequence[str]], words: int = 1) -> str:
    """Render a table below its title; the columns after the first ``words`` are right-aligned."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|" + "|".join(" --- " if index < words else " ---: " for index in range(len(heading))) + "|"
    return "\n".join([f"**{title}**", "", line(heading), rule, *(line(cells) for cells in lines), ""])


def latex(title: str, heading: Sequence[str], lines: Sequence[Sequence[str]], words: int = 1) -> str:
    """Render a table for the LaTeX package booktabs; the columns after the first ``words`` are right-aligned."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(_ESCAPES.get(character, character) for character in cell) for cell in cells) + r" \\"

    columns = "l" * words + "r" * (len(heading) - words)
    body = [line(cells) for cells in lines]
    begin = [r"\begin{table}", r"\centering", rf"\caption{{{line([title])[:-3]}}}", rf"\begin{{tabular}}{{{columns}}}"]
    end = [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join([*begin, r"\toprule", line(heading), r"\midrule", *body, *end])
