"""Record the teacher's embeddings that the notebooks read, so that they run where the teacher is not installed.

    python scripts/record.py            # writes nbs/recorded/*.safetensors
"""

from pathlib import Path

from kklip_nb.evidence.other_words import load_queries
from kklip_nb.evidence.runner import load_material, save_word_table
from kklip_nb.teacher import cached_embeddings, load_teacher, packaged_source, save_embeddings
from kklip_nb.training import LAPTOP

FOLDER = Path(__file__).resolve().parent.parent / "nbs" / "recorded"
CHOSEN = dict(pooling=LAPTOP.pooling, layer=LAPTOP.layer, prompt=LAPTOP.prompt)
# name of the file: how the captions of the pairs are embedded
PAIRS = {
    "pairs-mean-last-bare": dict(pooling="mean", layer=-1, prompt="{}"),
    "pairs-last-last-bare": dict(pooling="last", layer=-1, prompt="{}"),
    "pairs-mean-15-bare": dict(pooling="mean", layer=15, prompt="{}"),
    "pairs-last-last-prompt": dict(pooling="last", layer=-1, prompt=LAPTOP.prompt),
    "pairs-last-29-prompt": CHOSEN,
}


def main() -> None:
    material, source = load_material(LAPTOP, progress=True), packaged_source()
    for name, how in PAIRS.items():
        embeddings = cached_embeddings(material.pairs.captions, load_teacher, source, progress=True, **how)
        save_embeddings(FOLDER / f"{name}.safetensors", embeddings, material.pairs.captions, teacher=source, **how)
    save_embeddings(FOLDER / "words-last-29-prompt.safetensors", material.word_embeddings, material.words, bits=8, teacher=source, **CHOSEN)
    queries = load_queries(material.pairs).words
    embeddings = cached_embeddings(queries, load_teacher, source, progress=True, **CHOSEN)
    save_embeddings(FOLDER / "queries-last-29-prompt.safetensors", embeddings, queries, teacher=source, **CHOSEN)
    save_word_table(FOLDER / "word-table.safetensors", material.word_table, source)
    for path in sorted(FOLDER.glob("*.safetensors")): print(f"{path.stat().st_size / 1e6:5.1f} MB  {path.name}")


if __name__ == "__main__":
    main()
