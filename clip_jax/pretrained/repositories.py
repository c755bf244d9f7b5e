"""Where published weights lie: open_clip's pretrained pairs, and OpenAI's own archives.

`repositories.txt` beside this file is the table of the pairs. The repositories of tokenizers are
those of open_clip 3.3.0's `model_configs/`, the archives those of OpenAI's `clip.py`.
"""

import functools
from importlib.resources import files

HUB_PREFIX = "hf-hub:"
"""What stands before the name of a repository."""

TOKENIZER_REPOSITORIES = {
    "roberta-ViT-B-32": "roberta-base",
    "xlm-roberta-base-ViT-B-32": "xlm-roberta-base",
    "xlm-roberta-large-ViT-H-14": "xlm-roberta-large",
    "ViT-B-16-SigLIP-256": "timm/ViT-B-16-SigLIP",
    "ViT-B-16-SigLIP-384": "timm/ViT-B-16-SigLIP",
    "ViT-B-16-SigLIP-512": "timm/ViT-B-16-SigLIP",
    "ViT-L-16-SigLIP-256": "timm/ViT-B-16-SigLIP",
    "ViT-L-16-SigLIP-384": "timm/ViT-B-16-SigLIP",
    "ViT-SO400M-14-SigLIP": "timm/ViT-B-16-SigLIP",
    "ViT-SO400M-14-SigLIP-378": "timm/ViT-B-16-SigLIP",
    "ViT-SO400M-14-SigLIP-384": "timm/ViT-B-16-SigLIP",
    "ViT-SO400M-16-SigLIP-i18n-256": "timm/ViT-B-16-SigLIP-i18n-256",
    "ViT-L-14-CLIPA": "bert-base-uncased",
    "ViT-L-14-CLIPA-336": "bert-base-uncased",
    "ViT-H-14-CLIPA": "bert-base-uncased",
    "ViT-H-14-CLIPA-336": "bert-base-uncased",
    "ViT-bigG-14-CLIPA": "bert-base-uncased",
    "ViT-bigG-14-CLIPA-336": "bert-base-uncased",
    "nllb-clip-base": "facebook/nllb-200-distilled-600M",
    "nllb-clip-base-siglip": "facebook/nllb-200-distilled-600M",
    "nllb-clip-large": "facebook/nllb-200-distilled-1.3B",
    "nllb-clip-large-siglip": "facebook/nllb-200-distilled-1.3B",
    "ViT-H-14-worldwide": "facebook/xlm-v-base",
    "ViT-H-14-worldwide-378": "facebook/xlm-v-base",
    "ViT-bigG-14-worldwide": "facebook/xlm-v-base",
    "ViT-bigG-14-worldwide-378": "facebook/xlm-v-base",
}
"""The repository of a model's tokenizer, where it is not that of the weights."""

OPENAI_ADDRESS = "https://openaipublic.azureedge.net/clip/models"
OPENAI_SHA256 = {
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
"""The SHA-256 of the archive of each of OpenAI's names; it is in the address."""


@functools.cache
def repositories() -> dict[str, dict[str, str]]:
    """Return for each of open_clip's models its tags, and the place of each one's weights.

    A place is "owner/name" on the hub, "owner/name/file" there, or an address whose file name ends
    in the first digits of its SHA-256.
    """
    text = (files("clip_jax.pretrained") / "repositories.txt").read_text(encoding="utf-8")
    places: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            model, tag, place = line.split("\t")
            places.setdefault(model, {})[tag] = place
    return places


def openai_address(name: str) -> str:
    """Return the address of the archive of one of OpenAI's names, such as "ViT-L/14@336px"."""
    file = name.replace("/", "-").replace("@", "-") + ".pt"
    return f"{OPENAI_ADDRESS}/{OPENAI_SHA256[name]}/{file}"
