"""What a phase takes on a CPU beside weights and its network's call: pictures, the heap, the libraries.

All figures are measured on whole processes, and tests/test_promise_budget.py holds them.
"""

from __future__ import annotations

from minpaint.engine.calls import Request, Strategy

# Code and stacks of the first calls; and what the heap keeps of freed blocks: at most so many times the
# activations and so many bytes, or, where it keeps all of them, so many times the activations.
LIBRARIES = 48 * 2**20
HEAP, HEAP_OF_PICTURES = (0.5, 48 * 2**20), (0.5, 128 * 2**20)
KEPT_HEAP = {"encode": 1.5, "denoise": 2.5, "decode": 1.5}  # measured: up to 0.3, 2.1, 1.0; it varies by as much
# Tensors, in bytes a pixel. Of what the network sees: the picture and where it is blanked; its copy while that is
# encoded; continuing it into the hole. Of the part that is scaled for it: making the canvas, scaling the painting
# back, showing it. Of the box around the hole: matching colours, measuring the seam.
CANVAS, COPY, FILLING = 16, 28, 96
SEEN, SCALED, SHOWN = 12, 12, 36
MATCHED, SEAM = 124, 62
# Pictures, in bytes a pixel: one of any mode; giving a painting the original's mode; an original, its mask,
# its hole and its cover.
PICTURE, COMPLETED, FRAME = 4, 6, 7
# What a painter takes before it plans: its code, and a tokenizer, in bytes a token.
CODE, TOKEN = 4 * 2**20, 320


def loaded(tokens: int) -> int:
    """Bytes that a painter with so many tokens takes before it plans, and that the verb `plan` has not taken."""
    return CODE + TOKEN * tokens


def additions(name: str, request: Request, strategy: Strategy, taken: int) -> tuple[int, int]:
    """What a phase takes on a CPU whose network's call makes tensors of so many bytes.

    Returns the bytes of all tensors but weights, and of everything that is no tensor.
    """
    canvas, whole = request.starts * request.area, request.pixels
    part, seam = request.part or request.area, request.seam or request.area
    frame = 0 if request.opened else FRAME * whole
    tensors, pictures, after = 0, PICTURE * request.started * whole + frame, 0
    if name == "encode":
        taken += COPY * canvas
        tensors = max(FILLING * canvas, SEEN * part)
    elif name == "decode":
        scaled = 3 * 4 * request.area + (SCALED * part if part != request.area else 0)
        tensors = scaled + max(MATCHED * seam, SHOWN * part)
        pictures += PICTURE * (request.count * whole + 3 * part)
        after = frame + PICTURE * request.count * whole + max(COMPLETED * whole + SEAM * seam, request.saving * whole)
    kept = min(int(HEAP[0] * taken), HEAP[1])
    if strategy.keeps_heap:
        kept = int(KEPT_HEAP[name] * taken)
    # one after the other: the network's call, the work on its pictures, and what comes after the last phase
    peak = max(taken + kept, tensors + min(int(HEAP_OF_PICTURES[0] * tensors), HEAP_OF_PICTURES[1]))
    shown = 0 if name == "text" else CANVAS * canvas
    activations = max(taken, tensors) + shown
    return activations, LIBRARIES + max(peak + shown + pictures, after) - activations
