"""Names of mixers, patterns of whole stacks, options of scans: what a configuration says. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from vision_ssm.errors import UserError

MixerName = Literal["s6", "ssd", "nc_ssd", "s4d", "attention", "gated_conv"]
MapPattern = Literal["same", "alternating", "last_half_attention"]
"""For networks without position embeddings; MambaFormer's pattern is `alternating` there."""
MixerPattern = Literal["same", "alternating", "last_half_attention", "first_scan_without_positions"]

_RECURRENT = ("s6", "ssd", "s4d")
"""Mixers with a recurrence: it alone knows the order of what it reads, and has decays."""
_MOST_TAPS = 16


@dataclass(frozen=True)
class ScanOptions:
    """Options of a recurrent mixer, all off by default."""

    polar: Sequence[int] = (0, 0)
    """How many channels of the state never forget (decay 1), and how many hold the present input alone (decay 0),
    exactly (Wang et al., "Understanding and Mitigating Bottlenecks of State Space Models", 2025, section 5). s6 has
    them beside its learned states, ssd in place of as many heads."""
    smr: int = 0
    """Taps of the memory that is replayed into the input of a scan, 0 for none (`vision_ssm.memory_replay`)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "polar", tuple(self.polar))  # a list, as read from a file, will do
        if len(self.polar) != 2 or min(self.polar) < 0:
            raise UserError(f"polar must be two numbers of channels, 0 or more, such as [1, 1]; got {list(self.polar)}")
        if not 0 <= self.smr <= _MOST_TAPS:
            raise UserError(f"smr must be a number of taps up to {_MOST_TAPS}, or 0 for none; got {self.smr}")

    def check(self, mixer: str) -> None:
        """Refuse options that a mixer cannot have.

        Raises:
            UserError: Options of a scan for a mixer that does not scan, or polar channels that s4d has already.
        """
        if mixer not in _RECURRENT and self != NO_OPTIONS:
            raise UserError(
                f"polar and smr are options of scans ({', '.join(_RECURRENT)}); mixer {mixer} has no recurrence to "
                "change: leave them out"
            )
        if mixer == "s4d" and self.polar not in ((0, 0), (1, 0)):
            raise UserError(
                f"s4d takes polar [1, 0]: its coefficients are constant, so that one sum is all that decay 1 can give, "
                f"and its skip D is decay 0 already; got {list(self.polar)}"
            )


NO_OPTIONS = ScanOptions()


def check_mixer(mixer: str) -> None:
    """Refuse a name that no mixer has.

    Raises:
        UserError: with the names there are.
    """
    if mixer not in get_args(MixerName):
        raise UserError(f"mixer must be one of {', '.join(get_args(MixerName))}; got {mixer!r}")


@dataclass(frozen=True)
class MixerStack:
    """The mixers of a network's layers, as its configuration names them.

    Patterns:
    - same: ``mixer`` throughout.
    - alternating: ``mixer``, attention, ``mixer``, attention, ...
    - last_half_attention: ``mixer``, then attention in the last half (MambaVision); of an odd number, the smaller half.
    - first_scan_without_positions: as alternating, in a network that leaves its position embeddings out (MambaFormer):
      the first layer must be a scan, which knows the order.

    Raises:
        UserError: a name that is not known, or what has no meaning for this mixer.
    """

    mixer: MixerName = "s6"
    pattern: MixerPattern = "same"
    options: ScanOptions = NO_OPTIONS
    maps: bool = False
    """Whether the layers mix feature maps at several sizes, without position embeddings."""

    def __post_init__(self) -> None:
        check_mixer(self.mixer)
        self.options.check(self.mixer)
        allowed = get_args(MapPattern if self.maps else MixerPattern)
        if self.pattern not in allowed:
            raise UserError(f"mixer_pattern must be one of {', '.join(allowed)}; got {self.pattern!r}")
        if self.pattern != "same" and self.mixer == "attention":
            raise UserError(
                f'mixer_pattern {self.pattern} puts attention between other mixers; for attention alone use "same"'
            )
        if not self.positions and self.mixer not in _RECURRENT:
            raise UserError(
                f"first_scan_without_positions leaves the order to its first layer, a scan ({', '.join(_RECURRENT)}); "
                f"mixer {self.mixer} does not know it"
            )

    @property
    def positions(self) -> bool:
        """Whether the network has position embeddings, if it is of a kind that has any."""
        return self.pattern != "first_scan_without_positions"

    def layers(self, count: int, *, coarse: bool = True) -> list[tuple[MixerName, ScanOptions]]:
        """The mixer of each of ``count`` layers with its options.

        Args:
            count: of layers that follow each other, on maps those of one size.
            coarse: whether the map is one of the two smallest; last_half_attention spares the larger ones.
        """
        first = (self.mixer, self.options)
        second: tuple[MixerName, ScanOptions] = ("attention", NO_OPTIONS)
        if self.pattern == "same" or (self.pattern == "last_half_attention" and not coarse):
            return [first] * count
        if self.pattern == "last_half_attention":
            return [first] * (count - count // 2) + [second] * (count // 2)
        return [second if i % 2 else first for i in range(count)]
