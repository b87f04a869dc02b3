"""How the networks are called: each in the way that the plan chose for its phase.

The planner makes the same calls on tensors without numbers (the meta device) and counts their
memory, so that a prediction cannot drift from what is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minpaint.engine.banded import set_attention_slices, set_bands
from minpaint.engine.cuda import GraphReplay, has_hooks
from minpaint.engine.fast import Cache, PromptCache, accelerated, is_unmodified
from minpaint.engine.winograd import Thresholds
from minpaint.models.networks import PlainNetworks


@dataclass(frozen=True)
class Request:
    """What is to be painted, as far as memory depends on it.

    width, height: of what the network sees, in pixels. guided: every latent goes through the UNet
    twice, beside either prompt. starts: how many different pictures the paintings start from.
    again: whether the networks are needed once more after the last phase. steps: calls of the UNet.
    photo: width and height of the whole picture. opened: it is in memory when the run is planned.
    part: pixels of the part of it that is scaled for the network; seam: pixels of the box in which
    colours are matched and the seam is measured; where these are 0, all that the network sees.
    started: copies of the whole picture that views before the last have been painted into.
    saving: bytes for a pixel of the whole picture that saving will take after the run.
    """

    width: int
    height: int
    count: int = 1
    guided: bool = True
    starts: int = 1
    again: bool = True
    steps: int = 50
    photo: tuple[int, int] = (0, 0)
    part: int = 0
    seam: int = 0
    started: int = 0
    saving: int = 0
    opened: bool = True

    @property
    def area(self) -> int:
        """Pixels that the network sees."""
        return self.width * self.height

    @property
    def pixels(self) -> int:
        """Pixels of the whole picture."""
        return self.photo[0] * self.photo[1] or self.area

    @property
    def rows(self) -> int:
        """Rows of the UNet's whole batch."""
        return self.count * (2 if self.guided else 1)


@dataclass(frozen=True)
class Strategy:
    """How the calls of a phase are done.

    dtype, arithmetic: the number formats of the weights and of what is computed with them.
    batch: rows of the UNet's batch in one call. bands: into how many bands of rows the VAE's
    feature maps are cut; None leaves them whole. query_rows: from how many rows attention is
    computed at a time; None is all. fast: with the faster forms of the layers (fast.py).
    keeps_heap: freed memory stays in the heap for the next layers (budget.tune_heap). caches:
    weights in other forms are kept from step to step.
    """

    dtype: torch.dtype
    arithmetic: torch.dtype
    batch: int = 1
    bands: int | None = None
    query_rows: int | None = None
    fast: bool = False
    keeps_heap: bool = False
    caches: bool = False


class Calls:
    """The calls of one run, and what is kept between them.

    own: the checkpoint's own modules; somebody may have replaced those of `networks`, and a
    replacement is called as it is. guided: the second half of every batch of the UNet repeats the
    first beside another prompt. on_gpu: what computes is a GPU, on which layers stay as written.
    thresholds: where faster ways to compute begin to pay.
    """

    def __init__(
        self,
        networks: PlainNetworks,
        own: tuple[nn.Module, ...],
        device: torch.device,
        guided: bool,
        on_gpu: bool,
        thresholds: Thresholds,
    ) -> None:
        self.networks, self.own, self.device = networks, own, device
        self.guided, self.on_gpu, self.thresholds = guided, on_gpu, thresholds
        self.forget()

    def forget(self) -> None:
        """Free what is kept between calls."""
        self.prompt: PromptCache | None = None
        self.cache: Cache = {}
        self.replay: GraphReplay | None = None

    def prepare(self, network: nn.Module, strategy: Strategy) -> None:
        """Cut a network's attention, and the VAE's feature maps, into the parts that a strategy says."""
        set_attention_slices(network, strategy.query_rows)
        if network is self.networks.vae:
            set_bands(self.networks.vae, strategy.bands)

    def encode(self, strategy: Strategy, pixels: Tensor) -> Tensor:
        """Pixels [n, 3, Y, X] -> the VAE's mean and log variance, [n, 8, y, x] float32."""
        with self._accelerated(strategy, self.networks.vae) as arithmetic:
            return torch.cat(self.networks.encode(pixels.to(self.device, arithmetic)), dim=1).float()

    def decode(self, strategy: Strategy, latents: Tensor) -> Tensor:
        """Unscaled latents [n, 4, y, x] -> pixels [n, 3, Y, X] in the number format computed in."""
        with self._accelerated(strategy, self.networks.vae) as arithmetic:
            return self.networks.decode(latents.to(self.device, arithmetic))

    def unet(self, strategy: Strategy, x: Tensor, t: Tensor, context: Tensor, streamed: bool = False) -> Tensor:
        """The UNet's prediction [b, 4, y, x] float32, for a batch that may be split.

        On the meta device two parts are called, which take the memory that all take.
        What depends on the context alone is computed once, as long as the calls have the same
        tensor. On a GPU the whole call is recorded and replayed, unless weights are streamed.
        """
        unet, hooked, whole = self.networks.unet, has_hooks(self.networks.unet), strategy.batch >= len(x)
        if hooked or self.prompt is None or self.prompt.context is not context:  # a hook may change what it sees
            self.prompt, self.replay = PromptCache(context), None
            if self.device.type == "cuda" and strategy.fast and whole and not streamed and self._is_own(unet):
                self.replay = GraphReplay(lambda x, t: unet(x, t, context), self.device)
        paired, cache = self.guided and whole and not hooked, self.cache if strategy.caches and not hooked else None
        with self._accelerated(strategy, unet, paired, cache) as arithmetic:
            x = x.to(arithmetic)
            if self.replay is not None and not hooked:
                return self.replay(x, t).float()
            if whole:
                prediction: Tensor = unet(x, t, context).float()
                return prediction
            starts = range(0, len(x), strategy.batch)
            parts = (slice(start, start + strategy.batch) for start in (starts[:2] if x.is_meta else starts))
            return torch.cat([unet(x[part], t[part], context[part]).float() for part in parts])

    @contextmanager
    def _accelerated(
        self, strategy: Strategy, network: nn.Module, paired: bool = False, cache: Cache | None = None
    ) -> Iterator[torch.dtype]:
        """For a call of a network; gives the number format of what it then takes."""
        if not self._is_own(network):
            yield strategy.dtype
            return
        forms = None if self.on_gpu else strategy.arithmetic
        prompt = self.prompt if strategy.fast else None
        paired = paired and strategy.fast
        with accelerated(network, forms, strategy.fast, prompt, paired, cache, self.thresholds):
            yield strategy.arithmetic

    def _is_own(self, network: nn.Module) -> bool:
        """Whether a network is the checkpoint's own, as it is written."""
        return network in self.own and is_unmodified(network)
