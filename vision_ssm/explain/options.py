"""Options of `vssm explain`: the flags of each verb, their help and what carries them out. Imports no torch."""

from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from vision_ssm.errors import UserError
from vision_ssm.explain import Method

OUTPUT = Path("runs/explain")


@dataclass(frozen=True)
class DetectOptions:
    """Which box of which picture, and how it is explained."""

    picture: Path
    """The picture."""
    _: KW_ONLY
    weights: Path
    """Checkpoint folder, or name of shipped weights."""
    output: Path = OUTPUT
    """Folder for the maps and the page index.html."""
    box: int = 0
    """Number of the detection, from 0, best first."""
    name: str | None = None
    """Count only detections of this class."""
    layer: str = "all"
    """Layers to use: all, the beginning of a name, or a pattern such as 'neck.*'."""
    method: Method = "attribution"
    """attribution (what added to the score), raw or rollout (what the scans read at the box)."""
    per_direction: bool = False
    """A map for each reading direction too."""
    conf: float = 0.25
    """Least score of a detection."""
    image_size: int | None = None
    """Long side that the network sees; by default that of the training."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


@dataclass(frozen=True)
class RestoreOptions:
    """Which pixel of which picture, and how it is explained."""

    picture: Path
    """The degraded picture."""
    _: KW_ONLY
    weights: str
    """Checkpoint folder, published MambaIR file, or name of shipped weights."""
    query: str
    """The pixel as x,y, counted from the upper left."""
    output: Path = OUTPUT
    """Folder for the maps and the page index.html."""
    layer: str = "all"
    """Layers to use: all, the beginning of a name, or a pattern such as 'encoder.0.*'."""
    method: Method = "raw"
    """raw (rows of the mixing matrices), rollout, or attribution (what added to the pixel's value)."""
    per_direction: bool = False
    """A map for each reading direction too."""
    window: int = 192
    """Side of the square around the pixel that is restored."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UserError(f"window must be 1 pixel or more, got {self.window}")


@dataclass(frozen=True)
class GenerateOptions:
    """Which patch of which sample, and how it is explained."""

    weights: Path
    """Checkpoint folder or file of a run, or a pipeline's folder."""
    _: KW_ONLY
    query: str
    """A pixel of the patch as x,y, counted from the upper left."""
    output: Path = OUTPUT
    """Folder for the maps and the page index.html."""
    name: str | None = None
    """Class to draw, by name or number; by default the first."""
    frame: int = 0
    """Frame of the patch, from 0."""
    frames: int | None = None
    """Length of a video; by default the model's."""
    layer: str = "all"
    """Layers to use: all, the beginning of a name, or a pattern such as 'blocks.1*'."""
    method: Method = "attribution"
    """attribution (what added to the prediction), raw or rollout (what the scans read)."""
    per_direction: bool = False
    """A map for each reading direction too."""
    steps: int = 20
    """Of the sampler."""
    shown: int = 3
    """How many of the steps are explained, evenly spread."""
    seed: int = 0
    """Of the sample."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        if not 1 <= self.shown <= self.steps:
            raise UserError(f"shown must be 1 to the number of steps ({self.steps}), got {self.shown}")


@dataclass(frozen=True)
class ClassifyOptions:
    """Which class in which picture, and how it is explained."""

    picture: Path
    """The picture."""
    _: KW_ONLY
    weights: Path
    """Checkpoint folder or .safetensors file."""
    output: Path = OUTPUT
    """Folder for the maps and the page index.html."""
    name: str | None = None
    """Class to explain; by default the likeliest."""
    layer: str = "all"
    """Layers to use: all, the beginning of a name, or a pattern such as 'blocks.1*'."""
    method: Method = "attribution"
    """attribution (what added to the class), raw or rollout (what the scans read, mean over all places)."""
    per_direction: bool = False
    """A map for each reading direction too."""
    device: str = "auto"
    """auto, cpu or cuda."""


@dataclass(frozen=True)
class PerturbOptions:
    """Which maps are tested, on which pictures."""

    weights: Path
    """Classifier: checkpoint folder or .safetensors file."""
    data: Path
    """Folder with a folder per class, with splits (val or test is taken), or with idx files."""
    _: KW_ONLY
    output: Path | None = None
    """JSON file for the numbers."""
    layer: str = "all"
    """Layers to use: all, the beginning of a name, or a pattern such as 'blocks.1*'."""
    method: list[Method] = field(default_factory=lambda: ["raw", "rollout", "attribution"])
    """Maps to test: raw, rollout, attribution."""
    cells: int = 8
    """Cells along a side of the picture that are blanked, each as a whole."""
    count: int = 200
    """Pictures, drawn at random."""
    batch_size: int = 20
    """Pictures that go through the network together."""
    seed: int = 0
    """Of the drawing and of the random orders."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        for name, least in (("cells", 1), ("count", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be {least} or more, got {getattr(self, name)}")
