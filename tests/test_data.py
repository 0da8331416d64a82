"""Pairs, splits and batches; on small made-up input and on the real table of drawings."""

import random
import re
import unicodedata
from collections import Counter
from pathlib import Path

import emoji
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kklip_nb.data import (
    SIX,
    TEST_SEED,
    Pairs,
    _code_points,
    _is_variant,
    as_texts,
    base_concept,
    cache_dir,
    caption_batches,
    deal_captions,
    fold_caption,
    load_openmoji,
    load_words,
    mentions,
    singulars,
    openmoji_table,
    render_svg,
    six_rows,
    split_by_base,
    write_atomically,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path / "cache"))


# ---- base concepts and the real table


@pytest.mark.parametrize(
    "variants",
    [
        ("man running", "woman running", "person running", "person running facing right", "woman running facing right"),
        ("old man", "old woman", "older person"),
        ("prince", "princess"),
        ("mermaid", "merman", "merperson"),
        ("Santa Claus", "Mrs. Claus"),
        ("one o’clock", "twelve-thirty"),
        ("keycap 1", "keycap #"),
        ("man firefighter", "woman firefighter", "firefighter"),
    ],
)
def test_variants_of_one_thing_share_a_base_concept(variants):
    assert len({base_concept(v) for v in variants}) == 1, {v: base_concept(v) for v in variants}


def test_base_concepts_by_hand():
    by_hand = {"woman running facing right": "running", "man farmer": "farmer", "farmer": "farmer", "Mx Claus": "claus",
               "princess": "royalty", "older person": "old", "two o’clock": "clock face", "keycap 7": "keycap",
               "family man woman girl": "family", "men’s room": "men’s room", "dog face": "dog face", "boy": "person"}
    for caption, base in by_hand.items(): assert base_concept(caption) == base
    assert base_concept("men's room") == "men’s room" and base_concept("two o'clock") == "clock face"  # as a keyboard writes it
    for base in by_hand.values(): assert base_concept(base) == base  # a second pass changes nothing


@pytest.mark.parametrize(
    "one, other",
    [
        ("dog face", "cat face"),
        ("man running", "man walking"),
        ("mango", "go"),
        ("men’s room", "women’s room"),
        ("pizza", "hot dog"),
    ],
)
def test_different_things_have_different_base_concepts(one, other):
    assert base_concept(one) != base_concept(other)


def test_a_base_concept_is_never_empty_and_case_does_not_count(openmoji_rows):
    for row in openmoji_rows:
        assert row["base"] == base_concept(row["caption"]) == base_concept(row["caption"].upper().lower())
        assert row["base"].strip()
    assert base_concept("woman") and base_concept("man") == base_concept("woman")


def test_the_real_table_has_about_1659_pairs_and_19_without_subcategory(openmoji_rows):
    assert len(openmoji_rows) == pytest.approx(1659, abs=40)
    assert sum(r["subcategory"] is None for r in openmoji_rows) == pytest.approx(19, abs=3)
    assert all((r["category"] is None) == (r["subcategory"] is None) for r in openmoji_rows)
    assert all(r["path"].is_file() and r["caption"].strip() and ":" not in r["caption"][:1] for r in openmoji_rows)
    assert len({r["emoji"] for r in openmoji_rows}) == len(openmoji_rows)


def test_no_skin_tone_and_no_country_flag_is_in_the_table(openmoji_rows):
    assert not [
        r["caption"] for r in openmoji_rows if "skin tone" in r["caption"] or r["subcategory"] == "country-flag"
    ]


def test_code_points_know_skin_tones_and_country_flags():
    hamburger, thumb = emoji.emojize(":hamburger:"), emoji.emojize(":thumbs_up:")
    assert int(_code_points(hamburger), 16) == int.from_bytes(hamburger.encode("utf-32-be"))
    assert _code_points("\u2708\ufe0f") == "2708"  # airplane with a variation selector
    assert _is_variant(thumb + "\U0001F3FD") and not _is_variant(thumb)
    assert [_is_variant(thumb + chr(c)) for c in range(0x1F3FA, 0x1F401)] == [False] + [True] * 5 + [False]  # the five tones
    assert [_is_variant(chr(c)) for c in (0x1F1E5, 0x1F1E6, 0x1F1FF, 0x1F200)] == [False, True, True, False]
    assert _is_variant(emoji.emojize(":France:")) and not _is_variant(emoji.emojize(":pirate_flag:"))


def test_the_real_table_is_the_same_in_whatever_order_a_disk_lists_its_files(openmoji_rows, monkeypatch):
    listed = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: reversed(sorted(listed(self, pattern))))
    assert openmoji_table() == openmoji_rows


def test_the_six_of_the_worked_example_are_found_in_order(openmoji_rows):
    captions = [r["caption"] for r in openmoji_rows]
    assert [captions[i] for i in six_rows(captions)] == list(SIX)


# ---- texts that read the same


@pytest.mark.parametrize(
    "one, other",
    [
        ("Hot  Dog ", "hot dog"), ("hot\u00a0dog", "hot dog"), ("hot\tdog\n", "hot dog"), ("café", "cafe\u0301"), ("Ångström", "A\u030angstro\u0308m"),
        ("STRASSE", "straße"), ("\ufb01sh", "fish"), ("ＡＢＣ", "abc"), ("zero\u200bwidth", "zerowidth"), ("\ufeffbom", "bom"), ("soft\u00adhyphen", "softhyphen"),
        ("nul\0", "nul"), ("\0nul", "nul"), ("e\u200b\u0301", "é"), ("☺\ufe0f", "☺"), ("ﾊﾟ", "パ"), ("각", "각"), ("Ⅳ", "iv"), ("ℌ", "h"),
        ("a\u034fb", "ab"), ("\u3164hidden\u1160", "hidden"), ("葛\U000e0100", "葛"), ("\u1820\u180b", "\u1820"), ("☺\ufe00", "☺"), ("ΟΔΟΣ", "οδος"),
        ("don't", "don’t"), ("don\u02bct", "don’t"), ("T\u2011shirt", "t-shirt"), ("t\u2010shirt", "t-shirt"),
    ],
)
def test_texts_that_read_the_same_are_one(one, other):
    assert fold_caption(one) == fold_caption(other)
    both = [one, other] * 20 + [f"{i} other" for i in range(10)]
    split = split_by_base(both)
    assert sum(bool({0, 1} & set(part.tolist())) for part in split) == 1
    assert all(len({fold_caption(both[i]) for i in batch}) == 4 for batch in caption_batches(both, 4, seed=0))


@pytest.mark.parametrize("one, other", [("cafe", "café"), ("hotdog", "hot dog"), ("o’clock", "oclock"), ("a-b", "ab"), ("c1", "c2")])
def test_texts_that_read_otherwise_are_two(one, other):
    assert fold_caption(one) != fold_caption(other)


@given(text=st.text(max_size=12))
def test_folding_twice_is_folding_once_and_forms_do_not_matter(text):
    folded = fold_caption(text)
    assert fold_caption(folded) == folded == folded.strip()
    assert {fold_caption(unicodedata.normalize(form, text)) for form in ("NFC", "NFD", "NFKC", "NFKD")} == {folded}


def test_the_course_s_texts_are_folded_already(openmoji_rows):
    assert all(fold_caption(r["caption"]) == r["caption"].lower() and fold_caption(r["base"]) == r["base"] for r in openmoji_rows)


# ---- texts come in by one door


FORMS = {"list": list, "tuple": tuple, "array": np.array, "objects": lambda x: np.array(x, dtype=object), "iterator": iter, "generator": lambda x: (t for t in x), "keys": lambda x: dict.fromkeys(x).keys()}
TEXTS = [f"thing {i:02}" for i in range(40)]
TAKE_TEXTS = {
    "split_by_base": lambda x: split_by_base(x, 1), "deal_captions": lambda x: deal_captions(x, range(40), 7), "caption_batches": lambda x: caption_batches(x, 7, 2),
    "mentions, texts": lambda x: mentions(x, ["thing 07"]), "mentions, concepts": lambda x: mentions(["a thing 33", "thing"], x), "as_texts": as_texts,
    "load_words": lambda x: load_words(30, x), "six_rows": lambda x: six_rows([*x, *SIX])}


@pytest.fixture
def few_words(monkeypatch):
    "A short list in place of the 200,000 words."
    import wordfreq
    words = ["the", "of", "Adult", "adult", "dogs", "café", "cat's", "to", "and", "cat", "x-ray", "man", "sun", "people", "moon"] + ["word" + a + b for a in "abcdefghij" for b in "abcdefghij"]
    monkeypatch.setattr(wordfreq, "iter_wordlist", lambda language, *rest: iter(words if (language, *rest) == ("en",) else []))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TAKE_TEXTS)
def test_texts_may_be_any_column_or_iterator(name, form, few_words):
    want, got = (str(TAKE_TEXTS[name](x)) for x in (TEXTS, FORMS[form](TEXTS)))
    assert got == want


@pytest.mark.parametrize("bad", [None, float("nan"), 7, b"thing", ["thing"], np.datetime64("2020-01-01")])
@pytest.mark.parametrize("name", TAKE_TEXTS)
def test_what_is_no_text_is_named_with_its_row(name, bad, few_words):
    with pytest.raises(ValueError, match=r"row 2 is no text: .*drop"): TAKE_TEXTS[name](["a", "b", bad, *TEXTS])
    with pytest.raises(ValueError, match="is no text"): fold_caption(bad)


def test_tables_and_data_sets_give_their_columns():
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    for column in (pandas.Series(TEXTS, index=range(40, 0, -1)), datasets.Dataset.from_dict(dict(c=TEXTS))["c"]):
        assert as_texts(column) == TEXTS and {type(t) for t in as_texts(column)} == {str}
        for name in ("split_by_base", "caption_batches", "deal_captions"): assert str(TAKE_TEXTS[name](column)) == str(TAKE_TEXTS[name](TEXTS))
    with pytest.raises(ValueError, match="row 1 is no text"): split_by_base(pandas.Series(["a", None]))


def test_a_single_text_is_one_caption_and_no_list_of_letters(few_words):
    assert as_texts("dog") == ["dog"] and {type(t) for t in as_texts(np.array(["a"]))} == {str}
    assert [len(part) for part in split_by_base("dog")] == [1, 0, 0]
    assert mentions("a dog", "dog") == [True] and mentions(["a dog", "cat"], "dog") == [True, False]
    assert "dogs" not in load_words(3, "dog") and "dogs" in load_words(3, "d")
    for nothing in (None, 3):
        with pytest.raises(ValueError, match="row 0 is no text"): as_texts(nothing)


def test_rows_and_sizes_that_cannot_be_dealt_are_refused():
    for order, said in (([0, 3], "row 3 of 3 captions; expected 0 to 2"), ([-1], "row -1 of 3")):
        with pytest.raises(ValueError, match=said): deal_captions(["a", "b", "c"], order, 2)
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size={size}"): deal_captions(["a", "b"], [0, 1], size)
    assert [b.tolist() for b in deal_captions(["a", "b"], [1, 0], 1)[0]] == [[1], [0]]


@pytest.mark.parametrize("text, concept, hit", [
    ("हिन्दी भाषा", "भाषा", True), ("हिन्दी भाषा", "हिन", False), ("हिन्दी", "हनद", False), ("红色的狗", "狗", True), ("红色的狗", "色的", True), ("红色的狗", "红狗", False),
    ("かわいいねこ", "ねこ", True), ("パンダ", "パン", False), ("หมาดำ", "หมา", True), ("قطة سوداء", "قطة", True), ("قطة سوداء", "قط", False), ("ein Öl", "ÖL", True),
    ("snake_case", "case", False), ("es", "s", False), ("two s's", "s", True), ("№5", "no5", True)])
def test_words_are_whole_in_every_script(text, concept, hit):
    assert mentions([text], [concept]) == [hit]


# ---- split


def naive_split(bases, seed, val=0.15, test=0.2):
    "The split as it was first written, with numpy's unique: every result of the course was made with it."
    concepts = np.unique(np.asarray(bases, dtype=object).astype(str))
    shuffled = np.random.default_rng(2412).permutation(concepts)
    n_test, n_val = round(test * len(concepts)), round(val * len(concepts))
    rest = np.random.default_rng(seed).permutation(shuffled[n_test:])
    part = dict.fromkeys(shuffled[:n_test], 2) | dict.fromkeys(rest[:n_val], 1)
    which = np.array([part.get(b, 0) for b in bases])
    return [np.flatnonzero(which == p) for p in range(3)]


@pytest.mark.parametrize("seed", range(8))
def test_the_course_s_splits_have_not_moved(seed, openmoji_rows):
    bases = [r["base"] for r in openmoji_rows]
    for ours, first in zip(split_by_base(bases, seed), naive_split(bases, seed)): np.testing.assert_array_equal(ours, first)


@pytest.mark.parametrize("ending", ["\0", "\0\0", "\ud800", "🙂", "\x85"])
def test_odd_characters_do_not_move_a_row(ending):
    split = split_by_base([f"c{i:02}{ending}" for i in range(100)], seed=1)
    for part, plain in zip(split, split_by_base([f"c{i:02}" for i in range(100)], seed=1)): assert len(part) == len(plain)
    assert [len(p) for p in split] == [65, 15, 20]


def test_settings_not_given_are_those_of_the_course(openmoji_rows):
    bases = [r["base"] for r in openmoji_rows]
    for ours, first in zip(split_by_base(bases), naive_split(bases, 0, 0.15, 0.2)): np.testing.assert_array_equal(ours, first)
    for ours, first in zip(split_by_base(bases, 5, 0.3, 0.1), naive_split(bases, 5, 0.3, 0.1)): np.testing.assert_array_equal(ours, first)
    assert TEST_SEED == 2412


def test_shares_are_of_concepts_and_not_of_rows():
    bases = [*"abcdefghij"] + ["a"] * 90
    split = split_by_base(bases, 0, val=0.3, test=0.2)
    assert [len({bases[i] for i in part}) for part in split] == [5, 3, 2]


def check_split(split, bases):
    "Every row once, each part ascending, no base concept in two parts."
    assert sorted(np.concatenate(split).tolist()) == list(range(len(bases)))
    for part in split:
        assert np.all(np.diff(part) > 0)
    train, val, test = ({bases[i] for i in part} for part in split)
    assert not train & val and not train & test and not val & test


@given(bases=st.lists(st.text("abcé ’", max_size=3), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_a_split_never_straddles_a_base_concept(bases, seed):
    check_split(split_by_base(bases, seed), bases)


def test_the_real_split_never_straddles_and_has_the_asked_shares(openmoji_rows):
    bases = [r["base"] for r in openmoji_rows]
    for seed in range(5):
        split = split_by_base(bases, seed)
        check_split(split, bases)
        kinds = [len({bases[i] for i in part}) / len(set(bases)) for part in split]
        assert kinds == pytest.approx([0.65, 0.15, 0.2], abs=0.01)
    assert [len(p) for p in split_by_base(bases, 0, val=0, test=0)][1:] == [0, 0]


def test_all_seeds_share_one_test_set_but_not_validation(openmoji_rows):
    bases = [r["base"] for r in openmoji_rows]
    splits = [split_by_base(bases, seed) for seed in range(5)]
    assert len({tuple(s.test.tolist()) for s in splits}) == 1
    assert len({tuple(s.val.tolist()) for s in splits}) == 5
    assert all(np.array_equal(a, b) for a, b in zip(splits[3], split_by_base(bases, 3)))


def test_the_test_concepts_do_not_depend_on_the_order_of_rows(openmoji_rows):
    bases = [r["base"] for r in openmoji_rows]
    turned = bases[::-1]
    assert {bases[i] for i in split_by_base(bases).test} == {turned[i] for i in split_by_base(turned).test}


@pytest.mark.parametrize(
    "bases, shares, said",
    [
        ([], {}, "(?i)no captions|empty"),
        (["a", "b"], dict(val=0.5, test=0.5), "0.5"),
        (["a", "b"], dict(val=-0.1), "-0.1"),
        (["a", "b"], dict(test=1.5), "1.5"),
        (["a", "b"], dict(val=float("nan")), "nan"),
    ],
)
def test_a_split_that_cannot_be_is_refused(bases, shares, said):
    with pytest.raises(ValueError, match=said):
        split_by_base(bases, **shares)


# ---- batches


@given(
    captions=st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=60),
    size=st.integers(2, 8),
    seed=st.integers(0, 999),
)
def test_batches_hold_no_caption_twice_and_no_row_twice(captions, size, seed):
    if size > len(set(captions)):
        return
    batches = [b.tolist() for b in caption_batches(captions, size, seed)]
    rows = [row for b in batches for row in b]
    assert all(len(b) == size and len({captions[i] for i in b}) == size for b in batches)
    assert len(rows) == len(set(rows)) and set(rows) <= set(range(len(captions)))
    left = Counter(captions) - Counter(captions[i] for i in rows)
    assert len(left) < size  # what is left could not fill another batch
    assert batches == [b.tolist() for b in caption_batches(captions, size, seed)]


def naive_batches(captions, batch_size, seed):
    "Batches as they were first written: one scan of all that waits for each."
    waiting = np.random.default_rng(seed).permutation(len(captions)).tolist()
    while len(waiting) >= batch_size:
        batch, later = {}, []
        for position, row in enumerate(waiting):
            if captions[row] in batch: later.append(row)
            else: batch[captions[row]] = row
            if len(batch) == batch_size:
                later += waiting[position + 1 :]
                break
        waiting = later
        if len(batch) == batch_size: yield list(batch.values())


@given(captions=st.lists(st.sampled_from("abcdefgh"), min_size=8, max_size=60), seed=st.integers(0, 999))
def test_batches_have_not_moved(captions, seed):
    size = len(set(captions))
    for batch_size in range(2, size + 1):
        assert [b.tolist() for b in caption_batches(captions, batch_size, seed)] == list(naive_batches(captions, batch_size, seed))


def test_the_course_s_batches_have_not_moved(openmoji_rows):
    for column in ("caption", "base"):
        texts = [r[column] for r in openmoji_rows]
        assert [b.tolist() for b in caption_batches(texts, 64, 3)] == list(naive_batches(texts, 64, 3))


@given(captions=st.lists(st.sampled_from(["a", "A", " a", "b", "c", "d", "e"]), max_size=40), size=st.integers(1, 6), seed=st.integers(0, 99))
def test_dealing_loses_no_row(captions, size, seed):
    order = random.Random(seed).sample(range(len(captions)), len(captions))
    batches, left = deal_captions(captions, order, size)
    assert sorted(np.concatenate([*batches, left]).tolist()) == list(range(len(captions)))
    assert all(len(b) == len({fold_caption(captions[i]) for i in b}) == size for b in batches)
    assert len({fold_caption(captions[i]) for i in left}) < size
    more = [f"new {i}" for i in range(size)]  # what is left over goes on in front of the next shard
    again, _ = deal_captions(captions + more, left + [len(captions) + i for i in range(size)], size)
    assert again and (not left or again[0][0] == left[0])


def test_another_epoch_has_another_order():
    captions = [str(i) for i in range(40)]
    orders = {tuple(np.concatenate(list(caption_batches(captions, 8, seed))).tolist()) for seed in range(5)}
    assert len(orders) == 5 and all(sorted(o) == list(range(40)) for o in orders)


@pytest.mark.parametrize(
    "captions, size, said",
    [(["a", "b"], 1, "1"), (["a", "b"], 0, "0"), (["a", "a", "b"], 3, "3(?s:.*)2"), ([], 2, "2")],
)
def test_batches_that_cannot_be_are_refused(captions, size, said):
    with pytest.raises(ValueError, match=said):
        list(caption_batches(captions, size, 0))


# ---- captions without images


IRREGULAR = {
    "child": "children", "foot": "feet", "goose": "geese", "man": "men", "mouse": "mice", "ox": "oxen", "person": "people",
    "tooth": "teeth", "woman": "women", "calf": "calves", "elf": "elves", "half": "halves", "knife": "knives", "leaf": "leaves",
    "life": "lives", "loaf": "loaves", "scarf": "scarves", "shelf": "shelves", "thief": "thieves", "wolf": "wolves",
    "baby": "babies", "butterfly": "butterflies", "cherry": "cherries", "city": "cities", "fairy": "fairies", "family": "families",
    "box": "boxes", "bus": "buses", "church": "churches", "dish": "dishes", "glass": "glasses", "potato": "potatoes",
    "cat": "cats", "day": "days", "monkey": "monkeys", "roof": "roofs", "sheep": "sheep",
}  # from a grammar book, typed by hand


def plurals(noun):
    "Every form of a noun that these tests speak of."
    return {noun, noun + "s", noun + "es", IRREGULAR.get(noun, noun)}


def naive_mentions(text, concepts):
    "Each concept slid along the text; the last word in the singular or plural."
    clean = lambda s: re.sub(r"\W+", " ", s.lower()).split()
    same = lambda a, b: bool(plurals(a) & {b} or plurals(b) & {a})
    for concept in map(clean, concepts):
        for i in range(len(clean(text)) - len(concept) + 1):
            part = clean(text)[i : i + len(concept)]
            if concept and part[:-1] == concept[:-1] and same(part[-1], concept[-1]):
                return True
    return False


@pytest.mark.parametrize("one, many", IRREGULAR.items())
def test_a_plural_leads_back_to_its_noun(one, many):
    assert {one, many} <= singulars(many) and one in singulars(one)
    assert mentions([f"two big {many}!", f"a {one}", f"{many}x"], [f"big {one}", one]) == [True, True, False]
    assert mentions([f"one {one}"], [many]) == [True]


def test_every_caption_s_plural_leads_back(openmoji_rows):
    "The last word of each caption, put into the plural by the rules of a grammar book."
    def plural(noun):
        if noun.endswith("fe"): return noun[:-2] + "ves"
        if re.search("[^aeiou]y$", noun): return noun[:-1] + "ies"
        return noun + ("es" if re.search("(s|x|z|ch|sh)$", noun) else "s")

    for noun in {r["caption"].lower().split()[-1] for r in openmoji_rows}:
        assert noun in singulars(noun) & singulars(plural(noun)) & singulars(noun + "s")
    assert singulars("tree") == {"tree"} and "cat" not in singulars("catch") and "bab" not in singulars("baby")


@pytest.mark.parametrize(
    "text, concepts",
    [
        ("A dog in the park", ["dog"]),
        ("hot dogs!", ["dog"]),
        ("Hot-Dog stand", ["hot dog"]),
        ("hotdog", ["dog"]),
        ("dogma", ["dog"]),
        ("the foxes run", ["fox"]),
        ("", ["dog"]),
        ("dog", []),
        ("dog", [""]),
        ("hot red dog", ["hot dog"]),
        ("O’CLOCK", ["o’clock"]),
        ("a b c d", ["b c"]),
        ("a b c d", ["b d"]),
        ("cat. dog", ["cat dog", "bird"]),
        ("crème brûlée", ["brûlée"]),
        ("c++ (new)", ["++"]),
        ("my feet", ["foot"]),
        ("a leaf", ["maple leaves"]),
        ("maple leaf", ["maple leaves"]),
        ("leaves of maple", ["maple leaves"]),
    ],
)
def test_mentions_is_a_search_for_whole_words(text, concepts):
    assert list(mentions([text], concepts)) == [naive_mentions(text, concepts)]


@given(
    texts=st.lists(
        st.lists(st.sampled_from(["dog", "dogs", "foxes", "feet", "baby", "hot", "Hot-Dog", "ma"]), max_size=5).map(" ".join),
        max_size=4,
    ),
    concepts=st.lists(st.sampled_from(["dog", "hot dog", "fox", "ma ma", "hot", "foot", "hot babies"]), max_size=3),
)
def test_mentions_agrees_with_a_naive_search(texts, concepts):
    assert list(mentions(texts, concepts)) == [naive_mentions(t, concepts) for t in texts]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_words_share_no_caption_and_no_base_concept_with_validation_or_test(seed, openmoji_rows):
    split = split_by_base([r["base"] for r in openmoji_rows], seed)
    held_out = {
        openmoji_rows[i][column] for part in (split.val, split.test) for i in part for column in ("caption", "base")
    }
    words = load_words(2000, held_out)
    assert len(words) == len(set(words)) == 2000
    any_concept = re.compile(
        "|".join(
            rf"\b{re.escape(form)}\b" for c in sorted(held_out, key=len, reverse=True) for form in plurals(c.lower())
        )
    )
    assert not [w for w in words if any_concept.search(w)]
    assert not {w.lower() for w in words} & {c.lower() for c in held_out}
    assert not {base_concept(w) for w in words} & {
        openmoji_rows[i]["base"] for part in (split.val, split.test) for i in part
    }


def test_words_are_deterministic_frequent_first_and_really_filtered():
    assert load_words(50, []) == load_words(80, [])[:50]
    assert "the" in load_words(20, []) and "the" not in load_words(20, ["the"])


def test_people_feet_and_families_do_not_get_in(openmoji_rows):
    words = load_words(3000, {r[key] for r in openmoji_rows for key in ("caption", "base")})
    assert not {"man", "men", "women", "people", "girls", "children", "feet", "families", "teeth", "babies"} & set(words)


def test_more_words_than_there_are_are_refused(few_words):
    assert len(load_words(109, [])) == 109
    with pytest.raises(ValueError, match="only 109 words are left.*fewer than 110"): load_words(110, [])


def test_words_by_hand(few_words):
    "In lower case a to z, three letters or more, in the list's order; neither a concept nor its plural nor what has the same base concept."
    assert load_words(9, []) == ["the", "adult", "dogs", "and", "cat", "man", "sun", "people", "moon"]
    assert load_words(6, ["Dog", "ＣＡＴ", "sun's"]) == ["the", "adult", "and", "man", "sun", "people"]
    for person in ("person", "Person ", "PERSON"): assert load_words(5, [person]) == ["the", "dogs", "cat", "sun", "moon"]
    assert load_words(0, []) == []


# ---- writing


def test_a_file_appears_whole(tmp_path):
    target = tmp_path / "new" / "file.txt"
    assert write_atomically(target, lambda part: part.write_text("whole")) == target
    assert target.read_text() == "whole" and [p.name for p in target.parent.iterdir()] == ["file.txt"]


def test_who_reads_the_old_file_goes_on_reading_it(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with open(target) as reader:
        write_atomically(target, lambda part: part.write_text("new"))
        assert reader.read() == "old" and target.read_text() == "new"


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_failed_write_leaves_no_trace_and_keeps_the_old_file(error, old, tmp_path):
    target = tmp_path / "file.txt"
    if old:
        target.write_text(old)

    def fail(part):
        part.write_text("half")
        assert not target.exists() or target.read_text() == old  # nobody sees half a file
        raise error

    with pytest.raises(error):
        write_atomically(target, fail)
    assert [p.read_text() for p in tmp_path.iterdir()] == ([old] if old else [])


def test_the_cache_folder_is_where_the_environment_says(tmp_path):
    assert cache_dir() == tmp_path / "cache" and cache_dir().is_dir()


# ---- drawings


def test_an_svg_is_drawn_on_white(tmp_path):
    file = tmp_path / "half.svg"
    file.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 2"><rect width="1" height="2" fill="#ff0000"/></svg>'
    )
    picture = render_svg(file, 8)
    assert picture.shape == (8, 8, 3) and picture.dtype == np.uint8
    assert (picture[:, :4] == (255, 0, 0)).all() and (picture[:, 4:] == 255).all()


def test_a_missing_or_broken_svg_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.svg"):
        render_svg(tmp_path / "gone.svg", 8)
    (tmp_path / "bad.svg").write_text("no drawing at all")
    with pytest.raises(ValueError, match="bad.svg"):
        render_svg(tmp_path / "bad.svg", 8)


@pytest.mark.parametrize("size", [0, -1, "8", None])
def test_a_size_that_cannot_be_is_refused_and_not_blamed_on_the_file(size, tmp_path):
    (tmp_path / "a.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 2"/>')
    with pytest.raises(ValueError, match=f"size={size!r}; expected a whole number"): render_svg(tmp_path / "a.svg", size)


def test_a_wide_svg_is_padded_to_a_square(tmp_path):
    (tmp_path / "wide.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 2"><rect width="4" height="2" fill="#0000ff"/></svg>')
    want = np.full((8, 8, 3), 255, np.uint8)
    want[2:6] = (0, 0, 255)
    np.testing.assert_array_equal(render_svg(tmp_path / "wide.svg", np.int64(8)), want)
    with pytest.raises(ValueError, match=tmp_path.name): render_svg(tmp_path, 8)  # a folder


def test_a_sample_of_the_real_drawings_is_what_is_loaded(monkeypatch, openmoji_rows):
    rows = openmoji_rows[::240]
    monkeypatch.setattr("kklip_nb.data.openmoji_table", lambda: rows)
    pairs = load_openmoji(24)
    assert isinstance(pairs, Pairs) and pairs.captions == [r["caption"] for r in rows] and pairs.bases == [r["base"] for r in rows]
    assert pairs.categories == [r["category"] for r in rows] and pairs.subcategories == [r["subcategory"] for r in rows]
    for picture, row in zip(pairs.images, rows): np.testing.assert_array_equal(picture, render_svg(row["path"], 24))
    assert load_openmoji().images.shape == (len(rows), 128, 128, 3)


@pytest.fixture
def three(tmp_path, monkeypatch):
    "Three drawings of one colour each in place of OpenMoji."
    rows = []
    for name, colour in (("red", "#ff0000"), ("green", "#00ff00"), ("blue", "#0000ff")):
        path = tmp_path / f"{name}.svg"
        path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 2"><rect width="2" height="2" fill="{colour}"/></svg>')
        rows.append(dict(path=path, emoji=name[0], caption=f"{name} square", base=name, category="colour", subcategory=f"{name}s"))
    monkeypatch.setattr("kklip_nb.data.openmoji_table", lambda: rows)
    return rows


def cached_files(): return sorted(p for p in cache_dir().iterdir() if "part" not in p.name)


def test_openmoji_is_drawn_once_then_read_from_the_cache(three, monkeypatch):
    first = load_openmoji(8)
    assert [tuple(picture[4, 4]) for picture in first.images] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert first[1:] == ([f"{c} square" for c in ("red", "green", "blue")], ["red", "green", "blue"], ["colour"] * 3, ["reds", "greens", "blues"])
    (cached,) = cached_files()
    assert cached.read_bytes() == first.images.tobytes()
    monkeypatch.setattr("kklip_nb.data.render_svg", lambda *_: pytest.fail("drawn again"))
    again = load_openmoji(8)
    np.testing.assert_array_equal(again.images, first.images)
    assert again[1:] == first[1:]


def test_another_size_and_another_drawing_are_other_files(three):
    load_openmoji(8)
    assert load_openmoji(4).images.shape == (3, 4, 4, 3) and len(cached_files()) == 2
    three[0]["path"].write_text(three[1]["path"].read_text() + "\n")
    assert tuple(load_openmoji(8).images[0, 4, 4]) == (0, 255, 0) and len(cached_files()) == 3
    three[0]["path"] = three[0]["path"].rename(three[0]["path"].with_name("other.svg"))
    load_openmoji(8)
    assert len(cached_files()) == 4


def test_a_cache_file_that_is_not_good_is_named(three):
    whole = load_openmoji(8).images.tobytes()
    (cached,) = cached_files()
    for bad in (b"", b"not an array", whole[:100], whole[:-1], whole + b"\0"):
        cached.write_bytes(bad)
        with pytest.raises(ValueError, match=re.escape(cached.name) + ".*delete it"): load_openmoji(8)
    cached.unlink()
    cached.mkdir()
    with pytest.raises(ValueError, match=re.escape(cached.name) + ".*delete it"): load_openmoji(8)


def test_captions_without_the_six_are_named():
    assert six_rows([*reversed(SIX)]) == [5, 4, 3, 2, 1, 0] and SIX[0] == "dog face"
    with pytest.raises(ValueError, match="no caption is 'pizza'.*load_openmoji"): six_rows([c for c in SIX if c != "pizza"])


def test_compounds_of_men_and_children_have_their_singular():
    plural, single = ["two snowmen", "firemen at work", "policewomen", "grandchildren", "the men", "an omen"], ["snowman", "fireman", "policewoman", "grandchild", "man", "nothing"]
    assert [mentions([t], [c])[0] for t, c in zip(plural, single)] == [True] * 5 + [False]


@pytest.mark.parametrize("table", [np.array([["a", "b"]]), np.array("a")])
def test_a_table_is_no_column_of_texts(table):
    with pytest.raises(ValueError, match="pass one column"): as_texts(table)


def test_a_part_of_a_row_is_no_batch():
    for wrong in (2.5, "2", None):
        with pytest.raises(ValueError, match="batch_size"): deal_captions(list("abcdefgh"), range(8), wrong)
