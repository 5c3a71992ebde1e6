"""Why this box: heat maps of a detection's class score through the scans of backbone and neck."""

import torch
from torch import Tensor
from torchvision.ops import box_convert

from detection.head import decode, flatten_maps
from detection.letterbox import letterbox
from detection.postprocess import postprocess
from detection.predict import Detector
from detection.predict_options import PredictOptions
from vision_ssm.data.images import read_image
from vision_ssm.errors import UserError
from vision_ssm.explain.maps import Heat, combine, make_maps
from vision_ssm.explain.options import DetectOptions
from vision_ssm.explain.page import Panel, write_page
from vision_ssm.explain.recording import Layer, record

READING = (
    "The box in question is cyan; bright places count most. Attribution: how much each place added to the class score "
    "of this box through the scans, gradients included. Raw and roll-out: what the scans read at the box's cell, "
    "whether or not the score depended on it.",
    "The maps show the scans alone: convolutions between them have moved information by a few cells, and step sizes, "
    "B and C, which depend on the picture too, are held fixed.",
)


def run_explain(options: DetectOptions) -> int:
    """Write heat maps for one detection.

    Raises:
        UserError: no such weights, picture, box, class or layer.
    """
    PredictOptions(conf=options.conf, image_size=options.image_size)  # refuses what is out of range
    detector = Detector.from_pretrained(options.weights, device=options.device)
    image = read_image(options.picture)
    boxed, geometry = letterbox(image, options.image_size or detector.image_size)
    pixels = torch.from_numpy(boxed).to(detector.device).permute(2, 0, 1)[None].float() / 255
    with torch.enable_grad(), record(detector.model) as recording:
        raw = detector.model(pixels.requires_grad_())
    anchor, corners, label, score, rank = _chosen(detector, raw, options)
    target = flatten_maps(raw)[1][0, anchor, label]
    centre = (box_convert(corners[None], "xyxy", "cxcywh")[0, :2] / pixels.new_tensor(boxed.shape[1::-1])).tolist()

    def query(at: Layer) -> list[int]:
        assert at.grid is not None
        rows, columns = at.grid
        return [min(int(centre[1] * rows), rows - 1) * columns + min(int(centre[0] * columns), columns - 1)]

    ratio, left, top = geometry
    height, width = (round(side * ratio) for side in image.shape[:2])

    def panel(title: str, heats: list[Heat]) -> Panel:
        whole = combine(heats, boxed.shape[:2])[0].numpy()
        x1, y1, x2, y2 = ((corners.cpu().numpy() - [left, top, left, top]) / ratio).tolist()
        heat = whole[int(top) : int(top) + height, int(left) : int(left) + width]
        return Panel(title, heat, image, box=(x1, y1, x2, y2))

    chosen = recording.select(options.layer)
    found = make_maps(chosen, options.method, target=target, query=query, per_direction=options.per_direction)
    what = f"{detector.names[label]} {score:.2f}"
    panels = [panel(f"{what}: {title}", heats) for title, heats in found]
    facts = {"picture": options.picture, "weights": options.weights, "box": f"{rank}: {what}",
             "method": options.method, "layers": options.layer}  # fmt: skip
    title = f"Why this box: {what} in {options.picture.name}"
    write_page(options.output, title, panels, facts=facts, reading=READING)
    return 0


def _chosen(detector: Detector, raw: list[Tensor], options: DetectOptions) -> tuple[int, Tensor, int, float, int]:
    """Anchor, corners in network pixels, class, score and number of the box that was asked for."""
    box, name, conf = options.box, options.name, options.conf
    decoded = decode([level.detach() for level in raw])
    found = postprocess(decoded, conf=conf)[0]
    labels = found["labels"].tolist()
    if name is not None and name not in detector.names:
        raise UserError(f"these weights know no class {name!r}; they know {', '.join(detector.names)}")
    ranks = [k for k, label in enumerate(labels) if name in (None, detector.names[label])]
    if not 0 <= box < len(ranks):
        what = "box" if name is None else name
        raise UserError(
            f"there is no {what} number {box}: {len(ranks)} were found with a score above {conf}"
            + (f", numbered from 0 to {len(ranks) - 1}, best first" if ranks else "; lower --conf")
        )
    rank = ranks[box]
    corners, label = found["boxes"][rank], labels[rank]
    apart = (box_convert(decoded[0, :4].T, "cxcywh", "xyxy") - corners).abs().sum(1)
    apart = apart + (decoded[0, 4 + label] - found["scores"][rank]).abs()
    return int(apart.argmin()), corners, label, float(found["scores"][rank]), rank
