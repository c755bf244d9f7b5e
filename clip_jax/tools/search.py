"""Search embedded images: `python -m clip_jax.search DIR "a red bird"`, or `--image FILE`.

DIR is what `python -m clip_jax.embed` wrote, or a folder of clip-retrieval's with `--model`.
`--serve` shows a page for it at http://127.0.0.1:8000 instead.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clip_jax.errors import UserError, run_command

if TYPE_CHECKING:
    from clip_jax.embeddings.folder import Embeddings
    from clip_jax.embeddings.searcher import Hit
    from clip_jax.evaluation.encoders import Encoders


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.search", description=__doc__)
    parser.add_argument("folder", metavar="DIR", help="embeddings")
    parser.add_argument("query", nargs="?", help="words")
    parser.add_argument("--image", metavar="FILE", help="an image instead of words")
    parser.add_argument("--top", type=int, default=10, help="how many are shown")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    parser.add_argument(
        "--among", choices=("image", "text"), default="image", help="search images or captions"
    )
    parser.add_argument(
        "--using",
        default="auto",
        help="auto, exact, or faiss, whose index is kept in DIR; auto: faiss from 50,000 rows on",
    )
    parser.add_argument("--model", help="where the model that made DIR lies now")
    parser.add_argument("--architecture", help='of a bare file: "NAME" or "NAME:TAG"')
    parser.add_argument("--tokenizer", help="its tokenizer.json or SentencePiece .model")
    parser.add_argument("--serve", action="store_true", help="a page in the browser")
    parser.add_argument("--host", default="127.0.0.1", help="where it is served")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--data", help="the images, where they moved since they were embedded")
    return parser.parse_args(argv)


def load_encoders(args: argparse.Namespace, embeddings: "Embeddings") -> "Encoders":
    """The model that made the embeddings.

    Raises:
      UserError: it is not there any more, or has changed.
    """
    from clip_jax import api
    from clip_jax.embeddings.encode_query import check_model

    about = embeddings.about
    model = args.model or (about.model if about else None)
    if model is None:
        raise UserError(f"{embeddings.folder} does not say what made it; give --model")
    architecture = args.architecture or (about.architecture if about else None)
    tokenizer = args.tokenizer or (about.tokenizer if about else None)
    encoders = api.load_encoders(
        model, architecture=architecture or None, tokenizer=tokenizer or None
    )
    check_model(embeddings, encoders, model)
    return encoders


def own_template(model: str) -> str:
    """The prompt that a run evaluates with; empty where there is none."""
    from clip_jax.pretrained.work_folder import is_work_folder, read_description

    if not is_work_folder(model):
        return ""
    templates = (read_description(model).config.get("eval") or {}).get("templates")
    return str(templates[0]) if templates else ""


def read_picture(path: str) -> bytes:
    """The bytes of `--image`.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"--image {path} cannot be read: {e.strerror}") from None


def hits_text(hits: Sequence["Hit"]) -> str:
    """A line for each."""
    lines = [
        f"{place:>3}  {hit.score:7.4f}  {hit.about.get('image_path', hit.row)}"
        f"  {hit.about.get('caption') or ''}"
        for place, hit in enumerate(hits, start=1)
    ]
    return "\n".join(line.rstrip() for line in lines)


def hits_json(hits: Sequence["Hit"]) -> str:
    """The same with all that the metadata has."""
    found = [{"index": hit.row, "score": hit.score, **hit.about} for hit in hits]
    return json.dumps(found, indent=1, ensure_ascii=False, default=str)


def main() -> int:
    """Parse and search, or serve; the exit code."""
    from clip_jax.embeddings.encode_query import encode_picture, encode_words
    from clip_jax.embeddings.folder import open_embeddings
    from clip_jax.embeddings.searcher import Finder

    args = parse(None)
    if args.top < 1:
        raise UserError(f"--top is {args.top}; it must be at least 1")
    if args.serve:
        from clip_jax.search_page.serve import serve

        if args.query is not None or args.image is not None:
            raise UserError("--serve takes its questions on the page; leave the query out")
        embeddings = open_embeddings(args.folder)
        encoders = load_encoders(args, embeddings)
        model = args.model or (embeddings.about.model if embeddings.about else "")
        finder = Finder(embeddings, args.using)
        return serve(finder, encoders, args.host, args.port, args.data, own_template(model))
    if (args.query is None) == (args.image is None):
        raise UserError('give words, "a red bird", or --image FILE, and not both')
    picture = read_picture(args.image) if args.image else b""
    embeddings = open_embeddings(args.folder, args.among)
    finder = Finder(embeddings, args.using)
    encoders = load_encoders(args, embeddings)
    query_1D = (
        encode_picture(encoders, picture) if picture else encode_words(encoders, [args.query])
    )
    (hits,) = finder.search(query_1D, args.top)
    print(hits_json(hits) if args.json else hits_text(hits))
    return 0


if __name__ == "__main__":
    run_command(main)
