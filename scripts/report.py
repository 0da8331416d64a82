"""The result as one page that opens in any browser without a network: words, table, queries in pictures, maps."""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from kklip_nb.evaluation import first_place
from kklip_nb.tools import as_array, booleans, finite_matrix

FIRST, SHOWN, AT_ONCE = 5, 8, 12  # places that count as found; pictures a query; queries at a time
COLOURS, SHAPES = 8, ("round", "square", "diamond")  # of the largest concepts; the rest is grey
ENVIRONMENT = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)


class Query(NamedTuple):
    "One query, and what each system finds. Rows are rows of the pictures."
    text: str
    right: list[int]  # the right pictures
    found: dict[str, list[int]]  # system → its first pictures, nearest first
    place: dict[str, float]  # system → place of its first right picture, from 1


class Map(NamedTuple):
    "A map of captions, drawn as their pictures. All maps of a page share one numbering of concepts."
    name: str
    places: np.ndarray  # (n, 2)
    rows: list[int]  # n rows of the pictures
    labels: np.ndarray  # (n,) concept of each
    names: Sequence[str] | Mapping[int, str]  # concept → name


def make_queries(
    texts: Sequence[str],  # q queries
    right: np.ndarray,  # (q, n) booleans: the right pictures of each query, at least one
    similarities: Mapping[str, np.ndarray],  # system → (q, n), higher is nearer
    rows: Sequence[int] | np.ndarray,  # n: where the pictures that are searched lie among all pictures
) -> list[Query]:
    "Each query with what each system finds first."
    right = booleans("right", right)
    rows = as_array(rows)
    if rows.dtype == bool: rows = np.flatnonzero(rows)
    if right.ndim != 2 or rows.shape != right.shape[1:]:
        raise ValueError(f"rows of shape {rows.shape}, right of shape {right.shape}; expected (n,) and (q, n)")
    similarities = {name: finite_matrix(f"similarities of {name}", s) for name, s in similarities.items()}
    nearest = {name: rows[np.argsort(-s, 1, kind="stable")[:, :SHOWN]] for name, s in similarities.items()}
    places = {name: first_place(s, right) for name, s in similarities.items()}
    of = lambda table, i: {name: x[i].tolist() for name, x in table.items()}
    return [Query(text, rows[right[i]].tolist(), of(nearest, i), of(places, i)) for i, text in enumerate(texts)]


def data_uri(kind: str, content: bytes) -> str:
    "A picture within the page."
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def number(value: float) -> str:
    "3, or 3.5"
    return f"{value:.1f}".removesuffix(".0")


def sprite_sheet(
    images: np.ndarray,  # (n, size, size, 3) uint8, n not 0
) -> tuple[str, int, int]:  # data URI, columns, lines
    "All pictures on one sheet, row by row: drawings are kept to the pixel, photos are smaller with loss."
    columns = int(np.ceil(np.sqrt(len(images))))
    lines, side = -(-len(images) // columns), min(images.shape[1], 128)
    sheet = Image.new("RGB", (columns * side, lines * side), "white")
    for i, image in enumerate(images):
        small = Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(small, (i % columns * side, i // columns * side))
    def saved(**how):
        sheet.save(file := io.BytesIO(), "WEBP", **how)
        return file.getvalue()
    return data_uri("webp", min(saved(lossless=True), saved(quality=80), key=len)), columns, lines


def sheet_cells(
    rows: Sequence[int],  # rows of the pictures, in the order of the sheet
    columns: int,  # of the sheet
    lines: int,  # of the sheet
) -> dict[int, tuple[float, float]]:  # row → percent from the left and from the top, as CSS counts them
    "Where each picture lies on the sheet."
    percent = lambda i, n: round(100 * i / max(n - 1, 1), 4)
    return {row: (percent(i % columns, columns), percent(i // columns, lines)) for i, row in enumerate(rows)}


def concept_looks(
    maps: Sequence[Map],
) -> list[tuple[int, str, int, str]]:  # concept, name, points, classes of style
    "The largest concepts of the first map, each with a colour and a shape."
    largest = Counter(as_array(maps[0].labels).tolist()).most_common(COLOURS) if maps else []
    return [(c, maps[0].names[c], size, f"c{look} {SHAPES[look % 3]}") for look, (c, size) in enumerate(largest)]


def map_points(
    drawn: Map,
    looks: Mapping[int, str],  # concept → classes of style
) -> list[tuple[int, float, float, int, str]]:  # row, percent from left and top, concept, classes of style
    "The points of one map, stretched to its box; coloured ones come last and lie on top."
    places = finite_matrix(f"places of {drawn.name}", drawn.places)
    low, high = places.min(0), places.max(0)
    x, y = (4 + 92 * (places - low) / np.where(high > low, high - low, 1)).T
    columns = drawn.rows, x.round(2).tolist(), (100 - y).round(2).tolist(), as_array(drawn.labels).tolist()
    points = [(int(row), left, top, c, looks.get(c, "crowd")) for row, left, top, c in zip(*columns, strict=True)]
    return sorted(points, key=lambda p: p[-1] != "crowd")


def used_rows(
    queries: Sequence[Query],
    maps: Sequence[Map],
    n: int,  # how many pictures there are
) -> list[int]:  # ascending
    "The pictures that the page shows, each once; raises ValueError for a row that is none of the n pictures."
    rows = {int(r) for m in maps for r in m.rows}
    for query in queries: rows.update(query.right, *query.found.values())
    if bad := [r for r in sorted(rows) if not 0 <= r < n]:
        raise ValueError(f"row {bad[0]} of {n} pictures; expected rows from 0 to {n - 1}")
    return sorted(rows)


def report_html(
    title: str,
    answer: Sequence[str],  # plain sentences, the first one is printed large
    table_head: Sequence[str],
    table_rows: Sequence[Sequence[str]],  # as many cells each as the head; a cell may have several lines
    queries: Sequence[Query],  # in the order in which they were drawn; the systems of the first one are those of all
    maps: Sequence[Map],
    images: np.ndarray,  # (n, size, size, 3) uint8
    captions: Sequence[str],  # n
    credit: str,  # whose pictures these are; addresses in it become links
    figures: Mapping[str, str | Path],  # title → a PNG file
) -> str:  # HTML
    "The whole page; raises ValueError for a row that is no picture."
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} pictures with {len(captions)} captions; expected one each")
    if images.dtype != np.uint8 or images.shape[1:2] + (3,) != images.shape[2:]:
        raise ValueError(f"pictures of {images.dtype} with shape {images.shape}; expected uint8, (n, size, size, 3)")
    if len({tuple(s) for q in queries for s in (q.found, q.place)}) > 1: raise ValueError("queries of differing systems; expected those of the first one")
    rows = used_rows(queries, maps, len(images))
    sheet, columns, lines = sprite_sheet(images[rows]) if rows else ("data:,", 1, 1)
    systems, legend = list(queries[0].found) if queries else [], concept_looks(maps)
    hits = {name: [q.place[name] <= FIRST for q in queries] for name in systems}
    rates = [(name, sum(hits[name]), number(np.median([q.place[name] for q in queries]))) for name in systems]
    asked = [(q, [s for s, name in enumerate(systems) if hits[name][i]]) for i, q in enumerate(queries)]
    drawn = [(m, map_points(m, {concept: look for concept, *_, look in legend})) for m in maps]
    return ENVIRONMENT.get_template("report.html").render(
        title=title, answer=answer, table_head=table_head, table_rows=table_rows, captions=captions, credit=credit,
        queries=queries, asked=asked, rates=rates, first=FIRST, at_once=AT_ONCE, number=number, maps=maps, drawn=drawn,
        legend=legend, cells=sheet_cells(rows, columns, lines), sheet=sheet, columns=columns, lines=lines,
        figures={name: data_uri("png", Path(path).read_bytes()) for name, path in figures.items()})
