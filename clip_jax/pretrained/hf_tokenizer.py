"""Write CLIP's tokenizer as the files that Hugging Face's `CLIPTokenizer` reads."""

import json
from pathlib import Path

from clip_jax.tokenizers.clip_bpe import END, START, read_merges, vocabulary


def write_clip_tokenizer(folder: Path, context_length: int) -> None:
    """Write `vocab.json`, `merges.txt`, `tokenizer_config.json` and `special_tokens_map.json`.

    Its ids are OpenAI's for plain text; Hugging Face does not mend mojibake or HTML, and pads with
    the end token, which a causal tower does not see.
    """
    merges = read_merges()
    pieces = [*vocabulary(merges), START, END]
    tokens = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    files = {
        "vocab.json": {piece: i for i, piece in enumerate(pieces)},
        "special_tokens_map.json": tokens,
        "tokenizer_config.json": tokens
        | {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": context_length,
            "do_lower_case": True,
            "errors": "replace",
        },
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
