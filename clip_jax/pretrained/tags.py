"""List open_clip's pretrained (model, tag) pairs that can be loaded here, and how each was trained.

A file of weights does not give its activation or its preprocessing, and open_clip builds 28 of its
pairs with another activation than they were trained with, with a warning alone. So the pair is to
be given: `clip_jax.load(file, model="ViT-B-32:metaclip_400m")`. Source: open_clip 3.3
`pretrained.py`.
"""

from typing import NamedTuple

from clip_jax.data.images import (
    CLIPA,
    DFN5B,
    INCEPTION,
    MOBILECLIP,
    MOBILECLIP2,
    OPENAI,
    PE,
    SIGLIP,
    Preprocess,
)

# A star marks QuickGELU. A model's "-quickgelu" twin has the starred tags.
TAGS = {
    "RN50": "openai* yfcc15m* cc12m*",
    "RN101": "openai* yfcc15m*",
    "RN50x4": "openai*",
    "RN50x16": "openai*",
    "RN50x64": "openai*",
    "ViT-B-32": "openai* laion400m_e31* laion400m_e32* laion2b_e16 laion2b_s34b_b79k "
    "datacomp_xl_s13b_b90k datacomp_m_s128m_b4k commonpool_m_clip_s128m_b4k "
    "commonpool_m_laion_s128m_b4k commonpool_m_image_s128m_b4k commonpool_m_text_s128m_b4k "
    "commonpool_m_basic_s128m_b4k commonpool_m_s128m_b4k datacomp_s_s13m_b4k "
    "commonpool_s_clip_s13m_b4k commonpool_s_laion_s13m_b4k commonpool_s_image_s13m_b4k "
    "commonpool_s_text_s13m_b4k commonpool_s_basic_s13m_b4k commonpool_s_s13m_b4k "
    "metaclip_400m* metaclip_fullcc*",
    "ViT-B-32-256": "datacomp_s34b_b86k",
    "ViT-B-16": "openai* laion400m_e31 laion400m_e32 laion2b_s34b_b88k datacomp_xl_s13b_b90k "
    "datacomp_l_s1b_b8k commonpool_l_clip_s1b_b8k commonpool_l_laion_s1b_b8k "
    "commonpool_l_image_s1b_b8k commonpool_l_text_s1b_b8k commonpool_l_basic_s1b_b8k "
    "commonpool_l_s1b_b8k dfn2b* metaclip_400m* metaclip_fullcc*",
    "ViT-B-16-plus-240": "laion400m_e31 laion400m_e32",
    "ViT-L-14": "openai* laion400m_e31 laion400m_e32 laion2b_s32b_b82k datacomp_xl_s13b_b90k "
    "commonpool_xl_clip_s13b_b90k commonpool_xl_laion_s13b_b90k commonpool_xl_s13b_b90k "
    "metaclip_400m* metaclip_fullcc* dfn2b* dfn2b_s39b",
    "ViT-L-14-336": "openai*",
    "ViT-H-14": "laion2b_s32b_b79k metaclip_fullcc* metaclip_altogether dfn5b*",
    "ViT-H-14-378": "dfn5b*",
    "ViT-g-14": "laion2b_s12b_b42k laion2b_s34b_b88k",
    "ViT-bigG-14": "laion2b_s39b_b160k metaclip_fullcc*",
    "ViT-B-16-SigLIP": "webli",
    "ViT-B-16-SigLIP-256": "webli",
    "ViT-B-16-SigLIP-i18n-256": "webli",
    "ViT-B-16-SigLIP-384": "webli",
    "ViT-B-16-SigLIP-512": "webli",
    "ViT-L-16-SigLIP-256": "webli",
    "ViT-L-16-SigLIP-384": "webli",
    "ViT-SO400M-14-SigLIP": "webli",
    "ViT-SO400M-16-SigLIP-i18n-256": "webli",
    "ViT-SO400M-14-SigLIP-378": "webli",
    "ViT-SO400M-14-SigLIP-384": "webli",
    "ViT-B-32-SigLIP2-256": "webli",
    "ViT-B-16-SigLIP2": "webli",
    "ViT-B-16-SigLIP2-256": "webli",
    "ViT-B-16-SigLIP2-384": "webli",
    "ViT-B-16-SigLIP2-512": "webli",
    "ViT-L-16-SigLIP2-256": "webli",
    "ViT-L-16-SigLIP2-384": "webli",
    "ViT-L-16-SigLIP2-512": "webli",
    "ViT-SO400M-14-SigLIP2": "webli",
    "ViT-SO400M-14-SigLIP2-378": "webli",
    "ViT-SO400M-16-SigLIP2-256": "webli",
    "ViT-SO400M-16-SigLIP2-384": "webli",
    "ViT-SO400M-16-SigLIP2-512": "webli",
    "ViT-gopt-16-SigLIP2-256": "webli",
    "ViT-gopt-16-SigLIP2-384": "webli",
    "ViT-L-14-CLIPA": "datacomp1b",
    "ViT-L-14-CLIPA-336": "datacomp1b",
    "ViT-H-14-CLIPA": "datacomp1b",
    "ViT-H-14-CLIPA-336": "laion2b datacomp1b",
    "ViT-bigG-14-CLIPA": "datacomp1b",
    "ViT-bigG-14-CLIPA-336": "datacomp1b",
    "ViT-H-14-worldwide": "metaclip2_worldwide*",
    "ViT-H-14-worldwide-378": "metaclip2_worldwide",
    "ViT-bigG-14-worldwide": "metaclip2_worldwide",
    "ViT-bigG-14-worldwide-378": "metaclip2_worldwide",
    "PE-Core-T-16-384": "meta",
    "PE-Core-S-16-384": "meta",
    "PE-Core-B-16": "meta",
    "PE-Core-L-14-336": "meta",
    "PE-Core-bigG-14-448": "meta",
    "EVA01-g-14": "laion400m_s11b_b41k",
    "EVA01-g-14-plus": "merged2b_s11b_b114k",
    "EVA02-B-16": "merged2b_s8b_b131k",
    "EVA02-L-14": "merged2b_s4b_b131k",
    "EVA02-L-14-336": "merged2b_s6b_b61k",
    "EVA02-E-14": "laion2b_s4b_b115k",
    "EVA02-E-14-plus": "laion2b_s9b_b144k",
    "roberta-ViT-B-32": "laion2b_s12b_b32k",
    "xlm-roberta-base-ViT-B-32": "laion5b_s13b_b90k",
    "xlm-roberta-large-ViT-H-14": "frozen_laion5b_s13b_b90k",
    "nllb-clip-base": "v1",
    "nllb-clip-large": "v1",
    "nllb-clip-base-siglip": "v1 mrl",
    "nllb-clip-large-siglip": "v1 mrl",
    "coca_ViT-B-32": "laion2b_s13b_b90k mscoco_finetuned_laion2b_s13b_b90k",
    "coca_ViT-L-14": "laion2b_s13b_b90k mscoco_finetuned_laion2b_s13b_b90k",
    "ViTamin-S": "datacomp1b",
    "ViTamin-S-LTT": "datacomp1b",
    "ViTamin-B": "datacomp1b",
    "ViTamin-B-LTT": "datacomp1b",
    "ViTamin-L": "datacomp1b",
    "ViTamin-L-256": "datacomp1b",
    "ViTamin-L-336": "datacomp1b",
    "ViTamin-L-384": "datacomp1b",
    "ViTamin-L2": "datacomp1b",
    "ViTamin-L2-256": "datacomp1b",
    "ViTamin-L2-336": "datacomp1b",
    "ViTamin-L2-384": "datacomp1b",
    "ViTamin-XL-256": "datacomp1b",
    "ViTamin-XL-336": "datacomp1b",
    "ViTamin-XL-384": "datacomp1b",
    "MobileCLIP-S1": "datacompdr",
    "MobileCLIP-S2": "datacompdr",
    "MobileCLIP-B": "datacompdr datacompdr_lt",
    "MobileCLIP2-B": "dfndr2b",
    "MobileCLIP2-S0": "dfndr2b",
    "MobileCLIP2-S2": "dfndr2b",
    "MobileCLIP2-S3": "dfndr2b",
    "MobileCLIP2-S4": "dfndr2b",
    "MobileCLIP2-L-14": "dfndr2b",
    "convnext_base": "laion400m_s13b_b51k",
    "convnext_base_w": "laion2b_s13b_b82k laion2b_s13b_b82k_augreg laion_aesthetic_s13b_b82k",
    "convnext_base_w_320": "laion_aesthetic_s13b_b82k laion_aesthetic_s13b_b82k_augreg",
    "convnext_large_d": "laion2b_s26b_b102k_augreg",
    "convnext_large_d_320": "laion2b_s29b_b131k_ft laion2b_s29b_b131k_ft_soup",
    "convnext_xxlarge": "laion2b_s34b_b82k_augreg laion2b_s34b_b82k_augreg_rewind "
    "laion2b_s34b_b82k_augreg_soup",
}
_QUICK = "-quickgelu"

# Pairs whose preprocessing is not their family's.
_EXCEPTIONS = {
    ("ViT-L-14", "laion2b_s32b_b82k"): INCEPTION,
    ("ViT-H-14", "dfn5b"): DFN5B,
    ("ViT-H-14-378", "dfn5b"): DFN5B,
    ("ViT-H-14-worldwide-378", "metaclip2_worldwide"): DFN5B,
    ("ViT-bigG-14-worldwide-378", "metaclip2_worldwide"): DFN5B,
}


class Pretrained(NamedTuple):
    """A published model: its entry of the zoo, and its preprocessing."""

    model: str
    preprocess: Preprocess


# A part of a model's name, lower case, and its family's preprocessing; the first that is there.
_FAMILIES = (
    ("siglip", SIGLIP),
    ("clipa", CLIPA),
    ("pe-core", PE),
    ("mobileclip2-s3", MOBILECLIP2),
    ("mobileclip2-s4", MOBILECLIP2),
    ("mobileclip2-l", OPENAI),
    ("mobileclip", MOBILECLIP),
)


def family_preprocess(model: str) -> Preprocess:
    """Return the preprocessing of a model's family, for where no tag says more."""
    return next((found for part, found in _FAMILIES if part in model.lower()), OPENAI)


def list_pretrained() -> list[tuple[str, str]]:
    """Return open_clip's (model, tag) pairs that can be loaded, "-quickgelu" names included."""
    pairs = []
    for model, tags in TAGS.items():
        pairs += [(model, tag.rstrip("*")) for tag in tags.split()]
        pairs += [(model + _QUICK, tag[:-1]) for tag in tags.split() if tag.endswith("*")]
    return pairs


def find_pretrained(model: str, tag: str) -> Pretrained | None:
    """Return the model and preprocessing a pair was trained with; None if there is no such pair."""
    plain = model.removesuffix(_QUICK)
    for entry in TAGS.get(plain, "").split():
        quick = entry.endswith("*")
        if entry.rstrip("*") != tag or (model != plain and not quick):
            continue
        preprocess = _EXCEPTIONS.get((plain, tag), family_preprocess(plain))
        return Pretrained(plain + _QUICK if quick else plain, preprocess)
    return None
