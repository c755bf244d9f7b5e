"""The page "Coming from FlaxCLIPModel": both sides of it, against transformers' PyTorch classes."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import clip_jax  # noqa: E402
from clip_jax.tokenizers.folder import write_clip_tokenizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
PAGE = Path(__file__).parents[2] / "docs" / "from_flax_clip.md"
NAME = "hf-hub:openai/clip-vit-base-patch32"
LIMIT = 1e-5
END = 49_407


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small CLIP as transformers saves it, with random weights, and an image beside it."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 49_408, "eos_token_id": END, "bos_token_id": END - 1},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=48,
    )
    model = transformers.CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter) * (parameter.ndim > 0)
    model.save_pretrained(folder)
    write_clip_tokenizer(folder, 77)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "cat.png")
    return folder


def page_code(folder) -> dict:
    """Run the page's code on the folder; return what it leaves."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert NAME in code and '"cat.png"' in code
    values: dict = {}
    code = code.replace(NAME, str(folder)).replace("cat.png", str(folder / "cat.png"))
    exec(code, values)
    return values


def test_the_pages_code_gives_what_transformers_gives(folder):
    here = page_code(folder)
    clip, texts = here["clip"], here["texts"]
    tokens = transformers.CLIPTokenizer.from_pretrained(folder)(
        texts, padding="max_length", return_tensors="pt"
    )
    mean, std = (np.array(x, np.float32) for x in (clip.preprocessing.mean, clip.preprocessing.std))
    pixels = (clip.preprocess(here["image"]).astype(np.float32) / 255 - mean) / std
    inputs = {"pixel_values": torch.tensor(pixels.transpose(0, 3, 1, 2)), **tokens}
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        there = model(**inputs)
        vision = model.vision_model(inputs["pixel_values"], output_hidden_states=True)
        text = model.text_model(**tokens, output_hidden_states=True)
        projected = model.visual_projection(vision[1]), model.text_projection(text[1])
    ends = (tokens["input_ids"] == END).int().argmax(dim=1)
    same(here["logits_per_image"], there.logits_per_image, 10 * LIMIT)
    same(here["shares"], there.logits_per_image.softmax(dim=1))
    same(here["image_embeds"], there.image_embeds)
    same(here["text_embeds"], there.text_embeds)
    same(here["image_features"], projected[0])
    same(here["text_features"], projected[1])
    image_states, text_states = here["image_states"], here["text_states"]
    same(image_states.rows_BLD, vision.last_hidden_state)
    same(image_states.pooled_BD, vision.pooler_output)
    same(image_states.blocks[0], vision.hidden_states[-2])
    same(image_states.blocks[1], vision.hidden_states[1])
    same(here["patches"].reshape(1, 16, -1), vision.last_hidden_state[:, 1:])
    same(text_states.pooled_BD, text.pooler_output)
    for row, end in enumerate(ends):  # behind the end token the padding differs
        same(text_states.rows_BLD[row, : end + 1], text.last_hidden_state[row, : end + 1])
        same(text_states.blocks[0][row, : end + 1], text.hidden_states[-2][row, : end + 1])
        same(text_states.blocks[1][row, : end + 1], text.hidden_states[1][row, : end + 1])
    # With transformers' ids, which diffusion models give without a mask, every row is the same.
    with torch.no_grad():
        text = model.text_model(tokens["input_ids"], output_hidden_states=True)
    states = clip.text_states(tokens["input_ids"].numpy(), blocks=[-2])
    same(states.rows_BLD, text.last_hidden_state)
    same(states.blocks[0], text.hidden_states[-2])
    same(clip.encode_image(pixels), there.image_embeds)


def same(here, there, limit: float = LIMIT) -> None:
    there = there.detach().numpy()
    scale = max(1.0, float(np.abs(there).max()))
    np.testing.assert_allclose(np.asarray(here) / scale, there / scale, atol=limit)


@pytest.mark.parametrize("tower", ["text", "image"])
def test_a_tower_by_itself_is_its_class(folder, tower):
    kind = {"text": transformers.CLIPTextModel, "image": transformers.CLIPVisionModel}[tower]
    model = kind.from_pretrained(folder).eval()
    clip = clip_jax.load(folder, towers=tower)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        if tower == "text":
            ids = rng.integers(0, 49_000, (2, 9))
            ids[:, -1] = END
            here, there = clip.text_states(ids), model(torch.tensor(ids))
        else:
            pixels = rng.standard_normal((2, 32, 32, 3)).astype(np.float32)
            here = clip.image_states(pixels)
            there = model(torch.tensor(pixels.transpose(0, 3, 1, 2)))
    same(here.rows_BLD, there.last_hidden_state)
    same(here.pooled_BD, there.pooler_output)


def test_a_siglips_states_are_its_own(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4}
    model = transformers.SiglipModel(
        transformers.SiglipConfig(
            text_config={**sizes, "vocab_size": 600, "projection_size": 64},
            vision_config={**sizes, "image_size": 32, "patch_size": 8},
        )
    ).eval()
    model.save_pretrained(tmp_path)
    clip = clip_jax.load(tmp_path)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 600, (3, 64))
    pixels = rng.standard_normal((2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        there = model(torch.tensor(ids), torch.tensor(pixels.transpose(0, 3, 1, 2)))
    same(clip.text_states(ids).rows_BLD, there.text_model_output.last_hidden_state)
    states = clip.image_states(pixels)
    same(states.rows_BLD, there.vision_model_output.last_hidden_state)
    same(states.pooled_BD, there.vision_model_output.pooler_output)
    same(clip.logits(pixels, ids), there.logits_per_image, 10 * LIMIT)
    same(clip.probabilities(pixels, ids), torch.sigmoid(there.logits_per_image))
