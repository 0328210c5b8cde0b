"""Augmentation of pictures on the training device: everything that may differ between two artists' drawings of a thing.

Each function takes and returns float RGB [B,3,S,S] in [0,1] on white, and draws its own strength for each picture.
"""

import math

import torch
import torch.nn.functional as F


def uniform(x: torch.Tensor, low: float, high: float, shape: tuple = (1, 1, 1)) -> torch.Tensor:
    return torch.empty(len(x), *shape, device=x.device).uniform_(low, high)


def sometimes(x: torch.Tensor, probability: float, changed: torch.Tensor) -> torch.Tensor:
    return torch.where(uniform(x, 0, 1) < probability, changed, x)


def blend_artists(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Mix with another artist's picture of the same concept: evenly, or by a smooth random mask."""
    even = uniform(x, 0, 1)
    mask = F.interpolate(torch.randn(len(x), 1, 4, 4, device=x.device), size=x.shape[-2:], mode="bicubic")
    mask = (mask * 3).sigmoid()
    alpha = torch.where(uniform(x, 0, 1) < 0.5, even, mask)
    return x + alpha * (other - x)


def warp(x: torch.Tensor, elastic: float = 0.12) -> torch.Tensor:
    """Turn, scale (which covers RandomResizedCrop), stretch, shear, shift, and bend smoothly."""
    angle = uniform(x, -0.45, 0.45, ()) * (uniform(x, 0, 1, ()) < 0.8)
    zoom, stretch = uniform(x, -0.4, 0.35, ()).exp(), uniform(x, -0.15, 0.15, ()).exp()
    shear = uniform(x, -0.2, 0.2, ())
    cos, sin = angle.cos(), angle.sin()
    sx, sy = zoom * stretch, zoom / stretch
    theta = torch.stack(
        [cos * sx, (shear * cos - sin) * sy, uniform(x, -0.2, 0.2, ()),
         sin * sx, (shear * sin + cos) * sy, uniform(x, -0.2, 0.2, ())], dim=-1
    ).view(-1, 2, 3)  # fmt: skip
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    bend = torch.randn(len(x), 2, 4, 4, device=x.device) * uniform(x, 0, elastic)
    grid = grid + F.interpolate(bend, size=x.shape[-2:], mode="bicubic").permute(0, 2, 3, 1)
    return F.grid_sample(x - 1, grid, align_corners=False) + 1


def recolour(x: torch.Tensor) -> torch.Tensor:
    """Hue, saturation, contrast, gamma, brightness; mostly the white ground stays white."""
    luma = torch.tensor([0.299, 0.587, 0.114], device=x.device).view(1, 3, 1, 1)
    paper = (10 * (1 - x.amin(1, keepdim=True))).clamp(0, 1)
    hue = torch.where(uniform(x, 0, 1) < 0.1, uniform(x, -math.pi, math.pi), uniform(x, -0.4, 0.4))
    gray = (x * luma).sum(1, keepdim=True)
    chroma = x - gray
    rolled = (chroma.roll(1, 1) - chroma.roll(-1, 1)) / math.sqrt(3)  # a turn about the gray axis
    saturation = torch.where(uniform(x, 0, 1) < 0.06, torch.zeros_like(hue), uniform(x, 0.4, 1.7))
    out = gray + saturation * (hue.cos() * chroma + hue.sin() * rolled)
    out = (out - 0.5) * uniform(x, 0.55, 1.4) + 0.5 + uniform(x, -0.2, 0.2)
    out = out + uniform(x, -0.12, 0.12, (3, 1, 1))
    out = out.clamp(1e-3, 1) ** uniform(x, -0.5, 0.5).exp()
    out = sometimes(out, 0.03, 1 - out)
    return torch.where(uniform(x, 0, 1) < 0.7, x + paper * (out - x), out)


def redraw(x: torch.Tensor) -> torch.Tensor:
    """Thinner or thicker lines, drawn outlines, blur, flat colours, grain."""
    grown, shrunk = F.max_pool2d(x, 3, 1, 1), -F.max_pool2d(-x, 3, 1, 1)
    edge = (grown - shrunk).amax(1, keepdim=True)
    out = sometimes(x, 0.15, x + uniform(x, 0, 1) * (grown - x))
    out = sometimes(out, 0.15, out + uniform(x, 0, 1) * (shrunk - out))
    out = sometimes(out, 0.2, out - uniform(x, 0.2, 1) * edge)
    out = sometimes(out, 0.2, F.avg_pool2d(F.pad(out, (1, 1, 1, 1), mode="replicate"), 3, 1))
    levels = uniform(x, 2, 6).round()
    out = sometimes(out, 0.15, (out * levels).round() / levels)
    return sometimes(out, 0.2, out + torch.randn_like(out) * uniform(x, 0, 0.08))


def cut_out(x: torch.Tensor, probability: float = 0.5, largest: float = 0.6) -> torch.Tensor:
    """Cover a rectangle with white or with a random colour."""
    size = x.shape[-1]
    at = torch.arange(size, device=x.device)
    inside = []
    for _ in range(2):
        side, middle = uniform(x, 0.15, largest, (1,)) * size, uniform(x, 0, size, (1,))
        inside.append((at - middle).abs() < side / 2)
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    colour = torch.where(uniform(x, 0, 1) < 0.5, 1.0, uniform(x, 0, 1, (3, 1, 1)))
    return torch.where(hole & (uniform(x, 0, 1) < probability), colour, x)


def augment(x: torch.Tensor, other: torch.Tensor, blend: float = 0.4, light: float = 0.0) -> torch.Tensor:
    """The whole chain, from uint8 pictures; a share `light` of the pictures is warped a little and left otherwise."""
    x, other = x.float() / 255, other.float() / 255
    x = warp(sometimes(x, blend, blend_artists(x, other)))
    heavy = cut_out(redraw(recolour(x)).clamp(0, 1))
    return sometimes(heavy, light, x) if light else heavy
