"""DiM: a diffusion model whose layers scan instead of attending, for images and video, after arXiv 2405.15881.

After, not of: of the paper's model the frame is known (DiT's, with bidirectional Mamba blocks in place of attention,
patches of VAE latents, class-conditional images and UCF-101 video), but neither its tables nor code could be had. So
sizes, conditioning, the order of video layers and the recipe are ours, and no figure of the paper is claimed for it.
It is not the DiM of Teng et al. (2405.14224), nor DiMSUM's.

Top to bottom: patches to tokens plus fixed positions, recomputed for the grid at hand; layers
``x + gate * mixer(norm(x) * (1 + scale) + shift)``, each reading the tokens in the order that its letter of ``layout``
says; a last norm and a linear layer that starts at zero, so an untrained net returns zeros. A single image skips the
layers that read along time, so weights trained on images go on with video.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from generation.conditioning import (
    ClassEmbedding,
    Conditioning,
    TimeEmbedding,
    build_modulation,
    grid_positions,
    sincos,
    zero_linear,
)
from generation.layouts import TEMPORAL, Letter, expand_layout, scanned, turned
from generation.objectives import ObjectiveName
from vision_ssm.directions import Read, ScanState
from vision_ssm.errors import UserError
from vision_ssm.mixer_config import NO_OPTIONS, MixerName, MixerPattern, MixerStack, ScanOptions
from vision_ssm.mixers import build_mixer

# Shapes: B batch, F frames, C channels, H/W height and width, L places (tokens) per frame, D model width,
# f frames that have a noise level of their own (F, or 1 for all alike).

SizeName = Literal["tiny", "mini", "S", "B", "L", "XL"]
PATCHES = (1, 2, 4, 8)
NORM_EPS = 1e-6


@dataclass(frozen=True)
class Size:
    """Width and number of layers. One layer has about half the weights of a DiT block, hence twice the layers."""

    width: int
    depth: int


SIZES: dict[SizeName, Size] = {
    "tiny": Size(64, 4),
    "mini": Size(128, 8),
    "S": Size(384, 24),
    "B": Size(768, 24),
    "L": Size(1024, 48),
    "XL": Size(1152, 56),
}


class Conditions(NamedTuple):
    """What layers and head take in beside the tokens."""

    layers: Tensor
    """(B, f, 1, D) time + class after a SiLU, or (B, f, 1, 3 D) for adaln_single."""
    head: Tensor
    """(B, f, 1, D) time + class after a SiLU."""

    def rows(self, count: int) -> "Conditions":
        """Those of the first samples of a batch."""
        return Conditions(self.layers[:count], self.head[:count])


class DiMBlock(nn.Module):
    """One layer: norm, modulation, mixer along the layer's axis, gate, residual.

    Shape: (B, F, L, D) -> (B, F, L, D)

    Args:
        dim: D.
        letter: What the layer reads along, see ``generation.layouts``.
        mixer: Kind of mixer.
        options: Of scans.
        conditioning: How time and class come in.
        state_size: Of the mixer, None for its default.
        causal: Whether layers along time read forwards only.
    """

    def __init__(
        self,
        dim: int,
        letter: Letter,
        *,
        mixer: MixerName,
        conditioning: Conditioning,
        state_size: int | None,
        causal: bool,
        options: ScanOptions = NO_OPTIONS,
    ) -> None:
        super().__init__()
        self.letter: Letter = letter
        self.modulation = build_modulation(conditioning, dim, added=letter == "t")
        self.mixer = build_mixer(
            mixer, dim, state_size=state_size, causal=causal and letter in TEMPORAL, options=options
        )  # fmt: skip

    def forward(self, x: Tensor, condition: Tensor, grid: tuple[int, int], branch: bool = False) -> Tensor:
        """See the class.

        Args:
            x: (B, F, L, D).
            condition: ``Conditions.layers``.
            grid: Rows and columns of the places.
            branch: ``Mixer.branch`` along time.
        """
        h, axis, gate = self._modulated(x, condition)
        if self.letter == "c":
            y = turned(self.mixer(turned(h, *grid), axis), *reversed(grid))
        elif branch and self.letter in TEMPORAL:
            y = self.mixer.branch(h, axis, x.shape[2] if self.letter == "j" else 1)
        else:
            y = self.mixer(h, axis)
        return x + gate * y.view_as(x)

    def advance(
        self,
        x: Tensor,
        condition: Tensor,
        before: ScanState | None = None,
        after: ScanState | None = None,
        *,
        last: bool = False,
    ) -> Read:
        """A piece of a video, exactly as in the whole; states as in ``Mixer.advance``."""
        h, axis, gate = self._modulated(x, condition)
        y, state = self.mixer.advance(h, axis, before, after, last=last)
        return x + gate * y.view_as(x), state

    def look_back(self, x: Tensor, condition: Tensor, after: ScanState | None) -> ScanState | None:
        """As ``Mixer.look_back``."""
        h, axis, _ = self._modulated(x, condition)
        return self.mixer.look_back(h, axis, after)

    def _modulated(self, x: Tensor, condition: Tensor) -> tuple[Tensor, int, Tensor]:
        """What the mixer reads, along which axis, and the gate on its result."""
        shift, scale, gate = self.modulation(condition)
        return *scanned(_shifted_norm(x, shift, scale), self.letter), gate


class Head(nn.Module):
    """Norm with shift and scale from time + class, then tokens to patches; zero at the start."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.modulation = zero_linear(dim, 2 * dim)
        self.linear = zero_linear(dim, outputs)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, F, L, D) and (B, f, 1, D) -> (B, F, L, outputs)."""
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return self.linear(_shifted_norm(x, shift, scale))


class DiM(ModelMixin, ConfigMixin):
    """State-space diffusion model of images and videos.

    Shape: (B, C, H, W) or (B, C, F, H, W) -> the same; H and W multiples of ``patch``, of any size.

    Parameters in millions (s6, patch 2, 4 channels, 1,000 classes; adaln_zero / token): S 37 / 26, B 141 / 99,
    L 494 / 343, XL 726 / 503.

    Args:
        size: Width and depth, see ``SIZES``.
        patch: Side of a patch, 1, 2, 4 or 8.
        in_channels: C, of pixels or latents.
        sample_size: H and W that pipelines draw if not told otherwise; one number for a square.
        sample_frames: F that pipelines draw if not told otherwise.
        num_classes: Classes from 0; None for an unconditional model.
        mixer: ``s6`` (selective scan), ``ssd`` (Mamba-2, made of matrix products), or another of
            ``vision_ssm.mixers``.
        mixer_pattern: Where attention stands among the layers, see ``vision_ssm.mixer_config``.
            first_scan_without_positions leaves the positions of places and frames out (MambaFormer).
        polar: Option of scans, see ``vision_ssm.mixer_config``.
        smr: Option of scans, see there.
        conditioning: ``adaln_zero``, ``adaln_single`` or ``token``, see ``generation.conditioning``.
        layout: What the layers read along, repeated over the depth: "s" for images, "sst" for video.
        causal: Layers along time (t, j) read forwards only, so that a video can stream without end. There is no
            frame position then: the scan knows the order, and a position beyond those of training would be new to it.
        objective: What the net predicts; schedulers are checked against it, see ``generation.objectives``.
        label_dropout: Share of labels that training replaces by "no class".
        width: Instead of the size's; a multiple of 4.
        depth: Instead of the size's.
        state_size: States of the mixer, None for 16 (s6, s4d) or 64 (ssd, nc_ssd).

    Raises:
        UserError: A value that is not allowed.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["DiMBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["DiMBlock"]
    _keep_in_fp32_modules: ClassVar[list[str]] = ["A_log", "D", "dt_bias"]

    @register_to_config
    def __init__(
        self,
        size: SizeName = "mini",
        *,
        patch: int = 2,
        in_channels: int = 3,
        sample_size: int | Sequence[int] = 32,
        sample_frames: int = 16,
        num_classes: int | None = None,
        mixer: MixerName = "s6",
        conditioning: Conditioning = "adaln_zero",
        layout: str = "s",
        causal: bool = False,
        objective: ObjectiveName = "flow",
        label_dropout: float = 0.1,
        width: int | None = None,
        depth: int | None = None,
        state_size: int | None = None,
        mixer_pattern: MixerPattern = "same",
        polar: Sequence[int] = (0, 0),
        smr: int = 0,
    ) -> None:
        super().__init__()
        _check(patch, num_classes, objective, label_dropout)
        dim, layers = _resolve(size, width, depth)
        self.gradient_checkpointing = False
        self.patches = nn.Conv2d(in_channels, dim, patch, stride=patch)
        self.time = TimeEmbedding(dim)
        self.classes = None if num_classes is None else ClassEmbedding(num_classes, dim, label_dropout)
        self.shared_modulation = zero_linear(dim, 3 * dim) if conditioning == "adaln_single" else None
        tokens = 0 if conditioning != "token" else 1 if num_classes is None else 2
        self.token_positions = nn.Parameter(0.02 * torch.randn(tokens, dim)) if tokens else None
        stack = MixerStack(mixer, mixer_pattern, ScanOptions(polar, smr))
        self.positions = stack.positions
        self.blocks = nn.ModuleList(
            DiMBlock(
                dim, letter, mixer=name, conditioning=conditioning, state_size=state_size if name == mixer else None,
                causal=causal, options=options,
            )
            for letter, (name, options) in zip(expand_layout(layout, layers), stack.layers(layers), strict=True)
        )  # fmt: skip
        timed = stack.positions and not causal and any(letter in TEMPORAL for letter in expand_layout(layout, layers))
        self.frame_gate = nn.Parameter(torch.zeros(dim)) if timed else None
        self.head = Head(dim, patch * patch * in_channels)
        nn.init.xavier_uniform_(self.patches.weight.view(dim, -1))
        nn.init.zeros_(self.patches.bias)  # pyright: ignore[reportArgumentType]

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        past: Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict what ``objective`` says.

        Args:
            sample: (B, C, H, W) noisy images, or (B, C, F, H, W) noisy videos.
            timestep: Noise level in the scheduler's units, 0 (clean) to 1000: one number, (B,), or (B, F) for one
                per frame.
            class_labels: (B,) from 0; ``num_classes`` means "no class", and so does None.
            return_dict: False for a tuple, as everywhere in diffusers.
            past: (B, C, F, H, W) videos; each frame of ``sample`` is then predicted as the one that follows the frames
                before it in there, as a stream does it, all in one pass. Of models that can stream.

        Returns:
            ``.sample``, shaped as ``sample``.

        Raises:
            UserError: A shape or a label does not fit the model.
        """
        x, conditions = self.embed(sample, timestep, class_labels, past)
        locating, grid = self.locating_layer(sample), self.grid(sample)
        for i, block in enumerate(self.layers(sample)):
            if i == locating:
                x = self.locate_frames(x)
            inputs = (x, conditions.layers, grid, past is not None)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, *inputs)  # pyright: ignore[reportOptionalCall]
            else:
                x = block(*inputs)
        if past is not None:
            x, conditions = x[: len(sample)], conditions.rows(len(sample))
        output = self.unembed(x, conditions, sample)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def advance(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        states: Sequence[ScanState] | None = None,
        *,
        last: bool = False,
    ) -> tuple[Tensor, list[ScanState]]:
        """Frames that continue a video, exactly as in the whole; only of a causal model.

        Args:
            sample: (B, C, F, H, W), F at least 1.
            timestep: As in ``forward``.
            class_labels: As in ``forward``.
            states: What the call for the frames before gave; None at the beginning.
            last: Nothing will go on from these frames: no states are made.

        Returns:
            The prediction, and the states after these frames, one for each layer along time; none if ``last``.

        Raises:
            UserError: The model is not causal, or as in ``forward``.
        """
        self.require_causal()
        x, conditions = self.embed(sample, timestep, class_labels)
        before = iter(() if states is None else states)
        after: list[ScanState] = []
        for block in self.layers(sample):
            if block.letter not in TEMPORAL:
                x = block(x, conditions.layers, self.grid(sample))
                continue
            x, state = block.advance(x, conditions.layers, None if states is None else next(before), last=last)
            after += [] if state is None else [state]
        return self.unembed(x, conditions, sample), after

    @property
    def can_stream(self) -> bool:
        """Whether every layer along time is a causal scan."""
        blocks: list[DiMBlock] = list(self.blocks)  # pyright: ignore[reportAssignmentType]
        return self.config["causal"] and all(block.mixer.recurrent for block in blocks if block.letter in TEMPORAL)

    def require_causal(self) -> None:
        """Refuse a model that cannot be continued.

        Raises:
            UserError: Its layers along time look ahead.
        """
        if not self.config["causal"] and any(block.letter in TEMPORAL for block in self.blocks):
            raise UserError("this model's layers along time read both ways; streaming needs one trained as causal=True")
        blocks: list[DiMBlock] = list(self.blocks)  # pyright: ignore[reportAssignmentType]
        if any(block.letter in TEMPORAL and not block.mixer.recurrent for block in blocks):
            raise UserError(
                "this model has attention along time, which keeps every frame; streaming needs scans there: "
                'mixer_pattern "same" with s6, ssd, s4d or gated_conv'
            )

    def layers(self, sample: Tensor) -> list[DiMBlock]:
        """The blocks that act on a sample: an image has no time to read along."""
        blocks: list[DiMBlock] = list(self.blocks)  # pyright: ignore[reportAssignmentType]
        return [block for block in blocks if sample.ndim == 5 or block.letter != "t"]

    def embed(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None, past: Tensor | None = None
    ) -> tuple[Tensor, Conditions]:
        """Tokens (B, F, L, D) with the positions of their places, and the conditions; 2 B rows with ``past``, clean."""
        self._check_sample(sample)
        levels = self._levels(timestep, len(sample), sample.shape[2] if sample.ndim == 5 else 1, sample.device)
        labels = self._class_vectors(class_labels, len(sample), sample.device)  # (B, 1, D) or None
        if past is not None:
            self._check_past(sample, past)
            sample, levels = torch.cat([sample, past]), torch.cat([levels, torch.zeros_like(levels)])
            labels = None if labels is None else torch.cat([labels, labels])
        video = sample.unsqueeze(2) if sample.ndim == 4 else sample
        batch, _, frames = video.shape[:3]
        maps = self.patches(video.transpose(1, 2).flatten(0, 1))  # (B F, D, H/p, W/p)
        x = maps.flatten(2).transpose(1, 2).unflatten(0, (batch, frames))
        if self.positions:
            positions = grid_positions(maps.shape[2], maps.shape[3], maps.shape[1], maps.device)
            x = x + positions.to(self.patches.weight.dtype)
        time = self.time(levels)  # (B, f, D)
        both = F.silu(time if labels is None else time + labels).unsqueeze(2)
        if self.token_positions is not None:
            parts = [time] if labels is None else [labels, time]
            extra = torch.stack([part.expand(-1, frames, -1) for part in parts], dim=2) + self.token_positions
            x = torch.cat([extra.to(x.dtype), x], dim=2)
        shared = both if self.shared_modulation is None else self.shared_modulation(both)
        return x, Conditions(shared, both)

    def grid(self, sample: Tensor) -> tuple[int, int]:
        """Rows and columns of the places of a sample (..., H, W)."""
        return sample.shape[-2] // self.config["patch"], sample.shape[-1] // self.config["patch"]

    def locating_layer(self, sample: Tensor) -> int | None:
        """Which of ``layers(sample)`` has frame positions added before it: the first along time, None without."""
        if self.frame_gate is None or sample.ndim == 4:
            return None
        return next(i for i, block in enumerate(self.layers(sample)) if block.letter in TEMPORAL)

    def locate_frames(self, x: Tensor) -> Tensor:
        """Add fixed frame positions, for any F, to (B, F, L, D), as far as the gate has learned to let them in."""
        if self.frame_gate is None:
            return x
        frames = sincos(torch.arange(x.shape[1], device=x.device), x.shape[-1])
        return x + (frames.to(self.patches.weight.dtype) * self.frame_gate).unsqueeze(1)

    def unembed(self, x: Tensor, conditions: Conditions, sample: Tensor) -> Tensor:
        """Tokens (B, F, L, D) to the shape of the sample they came from."""
        p, channels = self.config["patch"], self.config["in_channels"]
        if self.token_positions is not None:
            x = x[:, :, len(self.token_positions) :]
        cells = self.head(x, conditions.head).unflatten(-1, (p, p, channels))
        cells = cells.unflatten(2, self.grid(sample))  # (B, F, h, w, p, p, C)
        return cells.permute(0, 6, 1, 2, 4, 3, 5).reshape(sample.shape)

    def _levels(self, timestep: Tensor | float, batch: int, frames: int, device: torch.device) -> Tensor:
        """(B, 1), or (B, F) where every frame has its own."""
        t = torch.as_tensor(timestep, device=device)
        if t.numel() == 1:
            return t.reshape(1, 1).expand(batch, 1)
        if t.shape == (batch,):
            return t.unsqueeze(1)
        if t.shape == (batch, frames):
            return t
        raise UserError(
            f"timestep must be one number, ({batch},) or one per frame ({batch}, {frames}), got {tuple(t.shape)}"
        )

    def _class_vectors(self, labels: Tensor | None, batch: int, device: torch.device) -> Tensor | None:
        if self.classes is None:
            if labels is not None:
                raise UserError("class_labels were given to a model without classes (num_classes=None)")
            return None
        if labels is None:
            labels = torch.full((batch,), self.classes.num_classes, device=device)
        if labels.shape != (batch,):
            raise UserError(f"class_labels must be ({batch},), one per sample, got {tuple(labels.shape)}")
        return self.classes(labels).unsqueeze(1)

    def _check_past(self, sample: Tensor, past: Tensor) -> None:
        self.require_causal()
        if past.shape != sample.shape or sample.ndim != 5:
            raise UserError(f"past must be videos shaped as sample, got {tuple(past.shape)} and {tuple(sample.shape)}")

    def _check_sample(self, sample: Tensor) -> None:
        p, channels = self.config["patch"], self.config["in_channels"]
        if sample.ndim not in (4, 5) or sample.shape[1] != channels:
            raise UserError(
                f"DiM takes images (B, {channels}, H, W) or videos (B, {channels}, F, H, W), got {tuple(sample.shape)}"
            )
        height, width = sample.shape[-2:]
        if height % p or width % p or 0 in sample.shape[2:]:
            raise UserError(f"height and width must be multiples of the patch ({p}), got {height} x {width}")


def _shifted_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.rms_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale)


def _check(patch: int, num_classes: int | None, objective: str, label_dropout: float) -> None:
    if patch not in PATCHES:
        raise UserError(f"patch must be one of {', '.join(map(str, PATCHES))}, got {patch}")
    if num_classes is not None and num_classes < 1:
        raise UserError(f"num_classes must be at least 1, or None for an unconditional model, got {num_classes}")
    if objective not in get_args(ObjectiveName):
        raise UserError(f"objective must be one of {', '.join(get_args(ObjectiveName))}, got {objective!r}")
    if not 0 <= label_dropout < 1:
        raise UserError(f"label_dropout must be at least 0 and below 1, got {label_dropout}")


def _resolve(size: str, width: int | None, depth: int | None) -> tuple[int, int]:
    if size not in SIZES:
        raise UserError(f"DiM has the sizes {', '.join(SIZES)}; got {size!r}")
    given = SIZES[size]
    dim = given.width if width is None else width
    if dim < 4 or dim % 4:
        raise UserError(f"width must be a positive multiple of 4 (rows and columns get sines and cosines), got {dim}")
    return dim, given.depth if depth is None else depth
