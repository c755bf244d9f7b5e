"""Search embedded images: `python -m clip_jax.search DIR "a red bird"`, or `--image FILE`.

DIR is what `python -m clip_jax.embed` wrote, or a folder of clip-retrieval's with `--model`.
`--serve` shows a page for it at http://127.0.0.1:8000 instead.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_jax.errors import UserError, plain, run_command

if TYPE_CHECKING:
    from clip_jax.embeddings.folder import Embeddings
    from clip_jax.embeddings.searcher import Hit
    from clip_jax.evaluation.encoders import Encoders


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
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
        help="auto, exact, or faiss, whose index is stored in DIR; auto: faiss from 50,000 rows on",
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
    """Load the model that made the embeddings.

    Raises:
      UserError: it is not there any more, or has changed.
    """
    from clip_jax import api
    from clip_jax.embeddings.encode_query import check_model

    info = embeddings.info
    model = args.model or (info.model if info else None)
    if model is None:
        raise UserError(f"{embeddings.folder} does not say what made it; give --model")
    architecture = args.architecture or (info.architecture if info else None)
    tokenizer = args.tokenizer or (info.tokenizer if info else None)
    encoders = api.load_encoders(
        model,
        architecture=architecture or None,
        tokenizer=tokenizer or None,
        dtype=info.dtype if info else "float32",
    )
    check_model(embeddings, encoders, model)
    return encoders


def eval_template(model: str) -> str:
    """Return the prompt that a run evaluates with; empty where there is none."""
    from clip_jax.pretrained.work_folder import is_work_folder, read_description

    if not is_work_folder(model):
        return ""
    templates = (read_description(model).config.get("eval") or {}).get("templates")
    return str(templates[0]) if templates else ""


def read_image(path: str) -> bytes:
    """Return the bytes of `--image`.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"--image {path} cannot be read: {e.strerror}") from None


def search(args: argparse.Namespace) -> list["Hit"]:
    """Search as the command line says; return the results, best first.

    Raises:
      UserError: a flag is wrong, or the embeddings, the model or the image cannot be read.
    """
    from clip_jax.embeddings.encode_query import encode_image_query, encode_text_query
    from clip_jax.embeddings.folder import open_embeddings
    from clip_jax.embeddings.searcher import Searcher

    if (args.query is None) == (args.image is None):
        raise UserError('give words, "a red bird", or --image FILE, and not both')
    image = read_image(args.image) if args.image else b""
    searcher = Searcher(open_embeddings(args.folder, args.among), args.using)
    encoders = load_encoders(args, searcher.embeddings)
    query_1D = (
        encode_image_query(encoders, image) if image else encode_text_query(encoders, [args.query])
    )
    (hits,) = searcher.search(query_1D, args.top)
    return hits


def serve_page(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C; return the exit code.

    Raises:
      UserError: a flag is wrong, or the embeddings or the model cannot be read.
    """
    from clip_jax.embeddings.folder import open_embeddings
    from clip_jax.embeddings.searcher import Searcher
    from clip_jax.search_page.serve import serve

    if args.query is not None or args.image is not None:
        raise UserError("--serve takes its queries on the page; leave the query out")
    embeddings = open_embeddings(args.folder)
    encoders = load_encoders(args, embeddings)
    model = args.model or (embeddings.info.model if embeddings.info else "")
    searcher = Searcher(embeddings, args.using)
    return serve(
        searcher,
        encoders,
        host=args.host,
        port=args.port,
        data=args.data,
        template=eval_template(model),
    )


def one_line(value: Any) -> str:
    """Return a value's text with its line ends written out."""
    return str(value).replace("\n", "\\n")


def hits_text(hits: Sequence["Hit"]) -> str:
    """Return a line for each result."""
    lines = [
        f"{rank:>3}  {hit.score:7.4f}  {one_line(hit.metadata.get('image_path', hit.row))}"
        f"  {one_line(hit.metadata.get('caption') or '')}"
        for rank, hit in enumerate(hits, start=1)
    ]
    return "\n".join(line.rstrip() for line in lines)


def hits_json(hits: Sequence["Hit"]) -> str:
    """Return the results as JSON, with all that their metadata has."""
    rows = [{"index": hit.row, "score": hit.score, **hit.metadata} for hit in hits]
    return json.dumps(rows, indent=1, ensure_ascii=False, default=str)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, then search and print, or serve; return the exit code."""
    args = parse(argv)
    if args.top < 1:
        raise UserError(f"--top is {args.top}; it must be at least 1")
    if args.serve:
        return serve_page(args)
    hits = search(args)
    print(plain(hits_json(hits) if args.json else hits_text(hits)))
    return 0


if __name__ == "__main__":
    run_command(main)
