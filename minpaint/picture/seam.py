"""The seam: measuring it, and taking the colour step out of it.

What a network paints is often a little off in colour, and its autoencoder adds to it; beside the
kept pixels, which are pasted back exactly, the difference shows as an edge.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minpaint.picture.fill import membrane
from minpaint.picture.image import to_unit
from minpaint.picture.mask import reach_box

# of a few pairs, the one with which the tiny model's paintings keep to the prompt and show little seam
SHIFT = 0.15  # of pixels in [-1, 1]: 19 levels
FADE = 4.0  # pixels
NEIGHBOURHOOD = 8  # pixels on both sides of the seam that it is compared with
MEASURED = 2 * NEIGHBOURHOOD  # pixels around the hole that the seam's error is measured in


def match_colour(painted: Tensor, original: Tensor, kept: Tensor) -> Tensor:
    """The painting, [3, Y, X], without the shift that it has on the kept pixels around the hole.

    The network paints the kept pixels too: painted - original there is what it and the
    autoencoder got wrong. A membrane carries that difference smoothly into the hole, where it
    is subtracted; the painting keeps its own gradients and meets the kept pixels without a step
    (Perez et al. 2003, Poisson image editing, equation 4; Farbman et al. 2009). A difference
    beyond SHIFT is no shift but other content, as where the edge cuts an object: what is beyond
    fades within FADE pixels, so that it does not tint the hole. kept: [Y, X].
    """
    difference = (painted - original)[None]
    shift = difference.clamp(-SHIFT, SHIFT)
    difference -= shift
    wrong = membrane(shift, kept)
    del shift  # of a large picture it takes much memory
    return painted - wrong.add_(membrane(difference, kept, FADE))[0]


def seam_error(picture: Image.Image, hole: Image.Image) -> float:
    """How much the hole's edge shows, in 8-bit levels; 0 is not at all.

    The step between two neighbouring pixels should be as large across the edge as beside it. So
    this is |step - mean of the two steps beside it|, its mean over the colours and all pairs of
    pixels across the edge, minus its mean over the pairs near the edge that do not cross it.
    Never below 0; 0 if there is no edge.
    """
    box = reach_box(hole, MEASURED)
    levels, inside = 255 * to_unit(picture.crop(box).convert("RGB"))[0], to_unit(hole.crop(box))[0] > 0
    near = torch.stack([inside, ~inside]).float()
    near = F.max_pool2d(near, 2 * NEIGHBOURHOOD + 1, 1, NEIGHBOURHOOD).all(0)[0]  # both are within reach
    inside = inside[0]
    across, beside = torch.zeros(2), torch.zeros(2)  # sums and counts
    for _ in range(2):  # along x, then, everything transposed, along y
        if levels.shape[2] >= 4:
            step = levels.diff(dim=2)
            bend = (step[..., 1:-1] - (step[..., :-2] + step[..., 2:]) / 2).abs().mean(0)
            crossing = inside[:, 1:] != inside[:, :-1]
            here = crossing[:, 1:-1]
            clear = ~(crossing[:, 1:-1] | crossing[:, :-2] | crossing[:, 2:]) & near[:, 1:-2]
            across += torch.tensor([float(bend[here].sum()), float(here.sum())])
            beside += torch.tensor([float(bend[clear].sum()), float(clear.sum())])
        levels, inside, near = levels.transpose(1, 2), inside.T, near.T
    if across[1] == 0:
        return 0.0
    return max(float(across[0] / across[1] - beside[0] / beside[1].clamp(min=1)), 0.0)
