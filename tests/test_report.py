"""The report: what it says is what it was given, nothing is loaded from elsewhere, and it works in a real browser."""

import base64
import io
import re
import shutil
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from report import AT_ONCE, Map, Query, make_queries, report_html, sprite_sheet, used_rows

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = ["<b>bold</b>", "fish & chips", 'a "quoted" word', "it's $5 {{ x }}", "</script><script>document.title = 'broken'</script>"]
SYSTEMS = ("CLIP", "KKLIP", "teacher")


def pictures(n: int) -> np.ndarray:
    "Pictures that can be told from each other by their colour and by their quarters."
    rng = np.random.default_rng(0)
    return np.repeat(np.repeat(rng.integers(256, size=(n, 2, 2, 3), dtype=np.uint8), 32, 1), 32, 2)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    "40 pictures, 30 queries over the first 35 of them, two maps; the first captions are such that they must be escaped."
    rng, rows = np.random.default_rng(1), np.arange(35)
    captions = NASTY + [f"thing number {i}" for i in range(len(NASTY), 40)]
    right = np.zeros((30, 35), bool)
    right[np.arange(30), np.arange(30)] = True
    right[3, 20] = True
    noise = {"CLIP": 2.0, "KKLIP": 0.5, "teacher": 0.05}
    queries = make_queries(captions[:30], right, {s: right + noise[s] * rng.normal(size=right.shape) for s in SYSTEMS}, rows)
    labels, names = rng.integers(11, size=35), [f"concept <{i}>" for i in range(11)]
    maps = [Map(name, rng.normal(size=(35, 2)), rows.tolist(), labels, names) for name in ("CLIP & co", "KKLIP")]
    Image.new("RGB", (1100, 300), "gray").save(path := tmp_path_factory.mktemp("figures") / "losses.png")
    return dict(title="Does <it> help?", answer=["KKLIP finds 17.25 & CLIP 3.5 of 100.", "No more."], table_head=["", "R@1", "median rank"],
                table_rows=[["CLIP", "1.25\n(0.5–2)", "211"], ["KKLIP", "9.75 ± 0.25*", "31.5"]], queries=queries, maps=maps, images=pictures(40),
                captions=captions, credit="Pictures: <me>, https://example.org/licence", figures={"Losses": path})


@pytest.fixture(scope="module")
def html(given): return report_html(**given)


class Tags(HTMLParser):
    "All tags with their attributes, and all text."

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_data(self, data): self.text += data
    def all(self, **wanted): return [a for _, a in self.tags if all(v in (a.get(k) or "").split() for k, v in wanted.items())]


# --- the text of the page


def test_what_a_user_wrote_is_text_and_never_markup(given, html):
    page = Tags(html)
    labels = {a["data-row"]: a["aria-label"] for a in page.all() if "data-row" in a}
    assert [labels[str(i)] for i in range(len(NASTY))] == NASTY
    for text in (*NASTY, *given["answer"], given["title"], "CLIP & co", "concept <0>", "Pictures: <me>, "): assert text in page.text, text
    assert len([t for t, _ in page.tags if t == "script"]) == 1 and "<b>bold</b>" not in html


def test_nothing_is_loaded_from_elsewhere(html):
    page = Tags(html)
    loads = [a[k] for _, a in page.tags for k in ("src", "srcset", "data", "poster", "action") if a.get(k)]
    loads += [a["href"] for t, a in page.tags if a.get("href") and t != "a"] + re.findall(r"url\(([^)]*)\)", html)
    assert loads and all(x.startswith("data:") for x in loads)
    assert [a["href"] for t, a in page.tags if t == "a"] == ["https://example.org/licence"]
    assert "@import" not in html and "fetch(" not in html and "import(" not in html


def test_each_picture_is_embedded_once_and_at_its_cell(given, html):
    sheets = re.findall(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", html)
    assert len(sheets) == 1
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(sheets[0]))).convert("RGB"))
    cells, lines, columns = dict(), sheet.shape[0] // 64, sheet.shape[1] // 64
    for row, x, y in re.findall(r"\.r(\d+)\{background-position:([\d.]+)% ([\d.]+)%\}", html):
        cells[int(row)] = round(float(x) * (columns - 1) / 100), round(float(y) * (lines - 1) / 100)
    assert sorted(cells) == used_rows(given["queries"], given["maps"], 40) == list(range(35)) and len(set(cells.values())) == 35
    for row, (x, y) in cells.items(): np.testing.assert_array_equal(sheet[64 * y:64 * y + 64, 64 * x:64 * x + 64], given["images"][row])
    used = {a["data-row"] for a in Tags(html).all() if "data-row" in a}
    assert used == set(map(str, cells)), "every picture of the sheet is on the page"


def test_photos_are_kept_with_loss_and_reduced(rng):
    noise = rng.integers(256, size=(4, 16, 16, 3), dtype=np.uint8)
    photos = np.stack([np.asarray(Image.fromarray(x).resize((200, 200), Image.Resampling.BICUBIC)) for x in noise])
    uri, columns, lines = sprite_sheet(photos)
    file = base64.b64decode(uri.split(",")[1])
    assert (columns, lines) == (2, 2) and Image.open(io.BytesIO(file)).size == (256, 256) and len(file) < 256 * 256 / 2


def test_the_numbers_are_those_given(given, html):
    page = Tags(html)
    for cell in (c for row in (given["table_head"], *given["table_rows"]) for c in row): assert cell in page.text
    text = " ".join(page.text.split())
    for name in SYSTEMS:
        places = [q.place[name] for q in given["queries"]]
        hits = sum(p <= 5 for p in places)
        assert f"{name} {hits} median place {np.median(places):g}" in text
        assert f"found by {name} in its first 5 ({hits})" in text and f"missed by {name} ({30 - hits})" in text
        said = re.findall(rf"{name} right at place ([\d.]+)", text)
        assert said == [f"{p:g}" for p in places]


def test_the_right_pictures_are_marked_and_the_found_ones_in_order(given, html):
    for query, article in zip(given["queries"], html.split('<article class="query"')[1:], strict=True):
        page = Tags(article.split("</article>")[0])
        found = [a for a in page.all(**{"class": "pic"})][len(query.right):]
        assert [int(a["data-row"]) for a in found] == [r for s in SYSTEMS for r in query.found[s]]
        for a in found: assert ("right" in a["class"].split()) == (a.get("aria-description") == "right") == (int(a["data-row"]) in query.right)


def test_queries_are_made_from_similarities():
    similarities = np.array([[.1, .9, .5, .5], [.4, .3, .2, .1]])
    right = np.array([[True, False, False, True], [False, False, False, True]])
    first, second = make_queries(["a", "b"], right, {"one": similarities}, [10, 20, 30, 40])
    assert first == Query("a", [10, 40], {"one": [20, 30, 40, 10]}, {"one": 2.5}), "a tie counts its expected place"
    assert second == Query("b", [40], {"one": [10, 20, 30, 40]}, {"one": 4.0})


def test_places_on_a_map_keep_their_order(given, html):
    for drawn, part in zip(given["maps"], html.split('<div class="map group"')[1:], strict=True):
        points = re.findall(r'data-row="(\d+)" data-concept="(\d+)" tabindex="-1" style="left:([\d.]+)%;top:([\d.]+)%"', part.split("</figure>")[0])
        at = {int(row): (float(left), -float(top)) for row, _, left, top in points}
        for axis in (0, 1): assert np.argsort([at[r][axis] for r in drawn.rows]).tolist() == np.argsort(drawn.places[:, axis]).tolist()
        assert {int(row): int(c) for row, c, *_ in points} == dict(zip(drawn.rows, drawn.labels.tolist()))
    assert len(re.findall('<li><button type="button" aria-pressed', html)) == 8, "the largest concepts alone have colours"


def test_a_page_without_queries_maps_and_figures_is_a_page(given):
    html = report_html(**given | dict(queries=[], maps=[], figures={}, table_rows=[]))
    assert "No more." in html and "<h2" not in html and "<button" not in html


def test_one_point_and_points_in_a_line_are_drawn(given):
    for places in (np.zeros((1, 2)), np.array([[0.0, 1.0], [0.0, 2.0]])):
        n = len(places)
        assert "nan" not in report_html(**given | dict(maps=[Map("m", places, list(range(n)), np.zeros(n, int), ["c"])])).split("<main>")[1]


def test_rows_that_are_no_pictures_are_named(given):
    with pytest.raises(ValueError, match="row 40 of 40 pictures"): report_html(**given | dict(queries=[Query("x", [40], {"CLIP": [1]}, {"CLIP": 1.0})]))
    with pytest.raises(ValueError, match="40 pictures with 2 captions"): report_html(**given | dict(captions=["a", "b"]))


# --- the page in a browser


@pytest.fixture(scope="module")
def browser():
    if find_spec("playwright") is None: pytest.skip("playwright is not installed: pip install playwright")
    if CHROMIUM is None: pytest.skip("no chromium on PATH: apt-get install chromium")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        opened = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser, html, tmp_path):
    "A function that opens the report at a width; no network, and no error in the console by the end."
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    errors, asked, pages = [], [], []
    def route(route):
        asked.append(route.request.url)
        (route.continue_ if route.request.url.startswith("file://") else route.abort)()
    def go(width=1280, **options):
        page = browser.new_page(viewport=dict(width=width, height=800), **options)
        page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.route("**/*", route)
        page.goto((tmp_path / "report.html").as_uri())
        pages.append(page)
        return page
    yield go
    for page in pages: page.close()
    assert not errors and all(url.startswith(("file://", "data:")) for url in asked)


def seen(page, where: str) -> np.ndarray:
    "The mean colours of the four quarters of what is on the screen there."
    shot = np.asarray(Image.open(io.BytesIO(page.locator(where).first.screenshot())).convert("RGB")).astype(float)
    (h, w), n = np.array(shot.shape[:2]) // 4, 5
    return np.array([[shot[y - n:y + n, x - n:x + n].mean((0, 1)) for x in (w, 3 * w)] for y in (h, 3 * h)])


def assert_shows(page, given, row):
    "The card is on the screen, with this picture and its caption."
    page.wait_for_function("!document.getElementById('card').hidden")
    assert page.locator("#card p").first.inner_text() == given["captions"][row]
    np.testing.assert_allclose(seen(page, "#card .pic"), given["images"][row][[[16], [48]], [16, 48]], atol=3)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_as_wide_as_the_screen(open_page, width, scheme):
    page = open_page(width, color_scheme=scheme)
    for _ in range(2):  # with points, and with pictures in their place
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.locator("#pictures").check()
    dark = np.mean([int(x) for x in re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]]) < 128
    assert dark == (scheme == "dark") and page.title() == "Does <it> help?"


def test_a_found_picture_is_the_given_one_and_shows_its_caption_under_the_pointer(open_page, given):
    page = open_page()
    for number in (0, 3):
        for system, name in enumerate(SYSTEMS):
            row = given["queries"][number].found[name][2]
            page.locator(".query").nth(number).locator(".found").nth(system).locator(".pic").nth(2).hover()
            assert_shows(page, given, row)
    page.mouse.move(5, 5)
    assert page.locator("#card").is_hidden()


def test_a_point_shows_its_picture_and_is_marked_in_all_maps(open_page, given):
    page = open_page()
    for large in (False, True):
        page.locator("#pictures").set_checked(large)
        for row in (2, 17, 34):
            point = page.locator(f".map >> nth=0 >> .point[data-row='{row}']")
            point.scroll_into_view_if_needed()
            box = point.bounding_box()
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            assert_shows(page, given, row)
            assert page.locator("#card p").nth(1).inner_text() == f"concept <{given['maps'][0].labels[row]}>"
            assert page.locator(".point.same").evaluate_all("x => x.map(p => p.dataset.row)") == [str(row)] * 2
        page.mouse.move(5, 5)


def test_a_tap_shows_a_point_until_the_next_tap_elsewhere(open_page, given):
    page = open_page(390, has_touch=True)
    point = page.locator(".map >> nth=1 >> .point[data-row='20']")
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert_shows(page, given, 20)
    page.locator("#concepts").tap()
    assert page.locator("#card").is_hidden()


def test_the_keyboard_reaches_pictures_and_points(open_page, given):
    page = open_page()
    page.locator(".query >> nth=0 >> .wanted .pic").focus()
    page.keyboard.press("Tab")
    found = given["queries"][0].found["CLIP"]
    assert_shows(page, given, found[0])
    page.keyboard.press("ArrowRight")
    assert_shows(page, given, found[1])
    page.keyboard.press("ArrowDown")
    assert_shows(page, given, found[5])
    page.keyboard.press("Escape")
    assert page.locator("#card").is_hidden()
    page.locator(".key button").last.focus()
    page.keyboard.press("Tab")
    row = int(page.evaluate("document.activeElement.dataset.row"))
    assert_shows(page, given, row)
    page.keyboard.press("Enter")
    kin = {int(r) for r in page.locator(".map >> nth=1 >> .kin").evaluate_all("x => x.map(p => p.dataset.row)")}
    labels = given["maps"][0].labels
    assert kin == set(np.flatnonzero(labels == labels[row]).tolist())
    before = [page.evaluate("document.activeElement.dataset.row")]
    for key in ("ArrowRight", "ArrowUp", "ArrowLeft", "ArrowDown"):
        page.keyboard.press(key)
        before.append(page.evaluate("document.activeElement.dataset.row"))
    assert len(set(before)) > 1 and page.locator(".map >> nth=0 >> [tabindex='0']").count() == 1


def test_a_concept_of_the_key_is_outlined_and_let_go(open_page, given):
    page = open_page()
    labels, key = given["maps"][0].labels, page.locator(".key button").first
    key.click()
    assert page.locator(".map >> nth=0 >> .kin").count() == np.bincount(labels).max() and key.get_attribute("aria-pressed") == "true"
    key.click()
    assert page.locator(".kin").count() == 0 and key.get_attribute("aria-pressed") == "false"


def test_the_filter_shows_what_a_system_finds_or_misses(open_page, given):
    page = open_page()
    visible = lambda: page.locator(".query:visible h3").all_inner_texts()
    texts, listed = [f"“{q.text}”" for q in given["queries"]], []
    for _ in range(3):
        listed.append(visible())
        page.locator(".more").click()
    assert sum(listed, []) == texts and visible() == listed[0] == texts[:AT_ONCE], "after the last ones come the first"
    for i, name in enumerate(SYSTEMS):
        for sign, hit in (("+", True), ("-", False)):
            page.locator("#filter").select_option(f"{sign}{i}")
            fit = [f"“{q.text}”" for q in given["queries"] if (q.place[name] <= 5) == hit]
            assert visible() == fit[:AT_ONCE] and (not fit or page.locator("#count").inner_text().endswith(f"of {len(fit)}"))


def test_without_scripts_all_queries_are_there(open_page, given):
    page = open_page(java_script_enabled=False)
    assert page.locator(".query:visible").count() == len(given["queries"]) and page.locator(".controls:visible").count() == 0
