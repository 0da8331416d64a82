"""What record.py, demo.py and compare.py share: everything up to training, from the caches where it is there."""

import numpy as np
import open_clip
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kklip_nb.data import cache_dir, load_openmoji, load_words, write_atomically
from kklip_nb.evaluation import TEMPLATES
from kklip_nb.student import WordTable, make_word_table, piece_texts
from kklip_nb.teacher import Teacher, cached_embeddings, captions_hash, input_embeddings, load_teacher, packaged_source
from kklip_nb.training import Material, Recipe


def load_material(recipe: Recipe, progress: bool = False) -> Material:
    "Pairs, words, teacher embeddings and word table; the teacher is loaded only if something is missing."
    loaded: list[Teacher] = []
    def teacher() -> Teacher:
        if not loaded:
            if progress: print("loading the teacher (the first time it is unpacked, which takes about 40 s)", flush=True)
            loaded.append(load_teacher(recipe.teacher))
        return loaded[0]
    pairs = load_openmoji()
    words = load_words(recipe.words, {*pairs.bases, *pairs.captions})
    source = packaged_source() if recipe.teacher == "smollm2" else teacher().source
    how = dict(pooling=recipe.pooling, layer=recipe.layer, prompt=recipe.prompt, progress=progress)
    embeddings = cached_embeddings(pairs.captions, teacher, source, **how)
    word_embeddings = cached_embeddings(words, teacher, source, **how)
    texts = [*pairs.captions, *words, *(t.format(c) for t in TEMPLATES for c in sorted({*pairs.subcategories} - {None}))]
    return Material(pairs, embeddings, words, word_embeddings, cached_word_table(texts, teacher, source))


def cached_word_table(texts: list[str], teacher, source: str) -> WordTable:
    "The word table for the tokens of these texts, kept in the cache folder."
    path = cache_dir() / f"words-{captions_hash([source, *texts])[:16]}.safetensors"
    try:
        with safe_open(path, framework="numpy") as file: return WordTable(file.get_tensor("ids"), file.get_tensor("vectors").astype(np.float32))
    except (FileNotFoundError, SafetensorError): pass
    ids = np.unique(open_clip.SimpleTokenizer(context_length=77)(texts).numpy())
    table = make_word_table(ids, input_embeddings(teacher(), piece_texts(ids)))
    write_atomically(path, lambda part: save_word_table(part, table, source))
    return cached_word_table(texts, teacher, source)


def save_word_table(path, table: WordTable, source: str) -> None:
    "In half precision, with the teacher's name and hash."
    tensors = {"ids": np.ascontiguousarray(table.ids), "vectors": np.ascontiguousarray(table.vectors, dtype=np.float16)}  # save_file ignores strides
    save_file(tensors, path, metadata=dict(teacher=source, pooling="mean", layer="0", prompt="none", captions="tokens, see ids"))
