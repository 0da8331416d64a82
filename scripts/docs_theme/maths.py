"""Formulas in LaTeX become MathML, which browsers draw without any script."""

import re

from latex2mathml.converter import convert

FORMULA = re.compile(r"(```.*?```|~~~.*?~~~|(?<!`)`[^`\n]+`)|\$\$(.+?)\$\$|(?<![\\$\w])\$(?=\S)([^$]+?)(?<=\S)\$(?!\d)", re.S)


def formulas(text: str) -> str:
    "Markdown with every formula as MathML; code is left alone."
    def one(match: re.Match) -> str:
        code, block, inline = match.groups()
        if code: return code
        made = convert((block or inline).replace("\n", " "), display="block" if block else "inline")
        made = made.replace("|", "&#x7C;").replace("*", "&#x2A;").replace("_", "&#x5F;")  # nothing that Markdown would read
        return f'\n\n<div class="formula">{made}</div>\n\n' if block else f"<span>{made}</span>"  # else a line that begins with it is a block
    return FORMULA.sub(one, text)
