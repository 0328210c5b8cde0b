"""What the parts of the recipe share: concepts, captions, pictures, the tokenizer and where things lie."""

import io
import json
import random
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch

RECIPE = Path(__file__).resolve().parent
ROOT = RECIPE.parents[2]
sys.path += [str(ROOT), str(ROOT / "dataset")]

TINY = ROOT / "dataset" / "tiny"
ASSETS = ROOT / "minigpt4" / "assets" / "tiny"
ARTISTS = {
    "noto": TINY / "noto.tar.gz",
    "twemoji": TINY / "twemoji.tar.gz",
    "openmoji": ROOT / "data" / "tiny" / "openmoji.tar",
    "fluent": TINY / "fluent.tar.gz",  # measured on, never trained on
}
NUM_QUERIES = 16
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BOS, PAD = 1, 2  # <s>; </s>, which fills the positions after a caption's last token

SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)
DESCRIBE_PROMPTS = [
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
]


def blip_caption(text: str) -> str:
    """LAVIS's `blip_caption`, written out so that the recipe needs no part of the package but its models."""
    text = "".join(" " if c in '.!"()*#:;~' else c for c in text.lower())
    return " ".join(text.split()[:50])


def load_concepts() -> list[dict]:
    """All concepts in the order of the file: id, name, keywords, group; `caption` is the name as stage 1 reads it."""
    concepts = json.loads((TINY / "concepts.json").read_text())
    return [{**c, "caption": blip_caption(c["name"])} for c in concepts]


def describe(concept: dict, rng: random.Random) -> str:
    """One or two sentences about a concept: the text of stage 2 (dataset/tiny_text.py)."""
    import tiny_text

    by_id = getattr(describe, "concepts", None)
    if by_id is None:
        by_id = describe.concepts = {c.id: c for c in tiny_text.load_concepts()}
    return tiny_text.describe(by_id[concept["id"]], rng)


def load_pictures(artist: str, ids: list[str]) -> torch.Tensor:
    """One artist's pictures as uint8 [N,3,64,64], in the order of `ids`."""
    from PIL import Image

    with tarfile.open(ARTISTS[artist]) as tar:
        files = {m.name.rsplit(".", 1)[0]: tar.extractfile(m).read() for m in tar if m.isfile()}
    pictures = [np.asarray(Image.open(io.BytesIO(files[key])).convert("RGB")) for key in ids]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def load_tokenizer():
    """The shared tokenizer, as the `tokenizers` library reads it."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(ASSETS / "llama" / "tokenizer.json"))


def encode(tokenizer, text: str) -> list[int]:
    """The ids of one segment, without <s>."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def caption_targets(tokenizer, captions: list[str]) -> torch.Tensor:
    """[N,16]: token i of each caption for query i; the rest is PAD."""
    targets = torch.full((len(captions), NUM_QUERIES), PAD)
    for row, caption in zip(targets, captions, strict=True):
        ids = encode(tokenizer, caption)[:NUM_QUERIES]
        row[: len(ids)] = torch.tensor(ids)
    return targets


def normalise(images: torch.Tensor) -> torch.Tensor:
    """[0,1] RGB to CLIP's mean and standard deviation."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std
