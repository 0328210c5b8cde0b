"""The baseline for `tiny`: give a held-out picture the name of the training picture with the nearest pixels.

    python dataset/prepare_tiny.py
    python dataset/pixel_baseline.py           # or: --size 16 --data data/tiny

Every picture is shrunk to 16 x 16. Each of Fluent's pictures gets the name of the nearest training picture (OpenMoji,
Noto, Twemoji), once by squared distance and once by correlation, which ignores brightness and contrast.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from tiny_pictures import TINY_DIR, read_pictures

ROOT = Path(__file__).resolve().parents[1]


def as_vectors(pictures: dict[str, Image.Image], size: int) -> np.ndarray:
    """float32 [number of pictures, size * size * 3] in [0, 1], in the order of the mapping."""
    shrunk = [picture.resize((size, size), Image.Resampling.BICUBIC) for picture in pictures.values()]
    return np.stack([np.asarray(picture, dtype=np.float32).ravel() / 255 for picture in shrunk])


def standardised(vectors: np.ndarray) -> np.ndarray:
    """Rows of mean 0 and length 1. Among these, the nearest row is the one with the highest correlation."""
    centred = vectors - vectors.mean(axis=1, keepdims=True)
    return centred / np.linalg.norm(centred, axis=1, keepdims=True).clip(1e-6)


def nearest(queries: np.ndarray, known: np.ndarray) -> np.ndarray:
    """For each row of `queries`, the index of the nearest row of `known`."""
    distance = (queries**2).sum(1)[:, None] - 2 * queries @ known.T + (known**2).sum(1)[None]
    return distance.argmin(1)


def pixel_baseline(training: list[dict[str, Image.Image]], held_out: dict[str, Image.Image], size: int = 16) -> dict:
    """The share of held-out pictures that get the right name, by "distance" and by "correlation"."""
    ids, truth = np.array([key for pictures in training for key in pictures]), np.array(list(held_out))
    known, queries = np.concatenate([as_vectors(p, size) for p in training]), as_vectors(held_out, size)
    by_distance = ids[nearest(queries, known)]
    by_correlation = ids[nearest(standardised(queries), standardised(known))]
    return {"distance": float((by_distance == truth).mean()), "correlation": float((by_correlation == truth).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "tiny", help="output of prepare_tiny.py")
    parser.add_argument("--size", type=int, default=16, help="side of the shrunk pictures (default: 16)")
    args = parser.parse_args()
    if not (args.data / "openmoji.tar").exists():
        raise SystemExit(f"{args.data / 'openmoji.tar'} is missing. Run: python dataset/prepare_tiny.py")
    training = [args.data / "openmoji.tar", TINY_DIR / "noto.tar.gz", TINY_DIR / "twemoji.tar.gz"]
    held_out = read_pictures(TINY_DIR / "fluent.tar.gz")
    for measure, share in pixel_baseline([read_pictures(path) for path in training], held_out, args.size).items():
        print(f"nearest training picture by {measure} at {args.size} x {args.size}: {share:.1%} of Fluent named")


if __name__ == "__main__":
    main()
