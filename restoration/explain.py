"""Which pixels repaired this one: heat maps of one pixel of a restored picture."""

import torch
from torch import Tensor

from restoration.forward import network_input
from restoration.restorer import PictureRestorer
from restoration.unet import pad_to_multiple
from vision_ssm.data.images import read_image
from vision_ssm.errors import UserError
from vision_ssm.explain.maps import combine, make_maps
from vision_ssm.explain.options import RestoreOptions
from vision_ssm.explain.page import Panel, point_of, write_page
from vision_ssm.explain.recording import Layer, record

READING = (
    "The pixel in question is circled; bright pixels count most. Raw: the row of each stage's mixing matrix at this "
    "pixel, that is, where its scans read. Attribution: what each place added through the scans to the correction of "
    "the pixel.",
    "Effective receptive field: size of the gradient of the restored pixel by the input, through scans and "
    "convolutions alike. It is exact where the other maps are of the scans alone.",
)


def run_explain(options: RestoreOptions) -> int:
    """Write heat maps for one restored pixel.

    Raises:
        UserError: no such weights, picture, pixel or layer, or weights that need a mask.
    """
    window, weights = options.window, options.weights
    restorer = PictureRestorer.from_pretrained(weights, None, device=options.device)
    if restorer.needs_mask:
        raise UserError(f"the weights {weights} fill in what a mask leaves out, which is not explained; take others")
    image = read_image(options.picture)
    x, y = point_of(options.query, *image.shape[:2])
    top, left = (min(max(p - window // 2, 0), max(s - window, 0)) for p, s in zip((y, x), image.shape[:2], strict=True))
    cut = image[top : top + window, left : left + window]
    given = torch.from_numpy(cut).to(restorer.device).permute(2, 0, 1)[None].float() / 255
    pixels = network_input(given, restorer.card.scale, restorer.model.scale)
    height, width = pixels.shape[2:]
    pixels = pad_to_multiple(pixels, getattr(restorer.model, "multiple", 1)).requires_grad_()
    with torch.enable_grad(), record(restorer.model) as recording:
        restored = restorer.model(pixels)
    column, row = (int((p + 0.5) * height / cut.shape[0]) for p in (x - left, y - top))  # in the network's input
    target = restored[0, :, row * restorer.model.scale, column * restorer.model.scale].sum()
    (gradient,) = torch.autograd.grad(target, pixels, retain_graph=True)

    def seen_from(layer: Layer) -> list[int]:
        assert layer.grid is not None
        cell = pixels.shape[2] // layer.grid[0]
        return [row // cell * layer.grid[1] + column // cell]

    def panel(title: str, heat: Tensor) -> Panel:
        return Panel(title, heat[:height, :width].numpy(), cut, point=(x - left, y - top))

    chosen = recording.select(options.layer)
    found = make_maps(chosen, options.method, target=target, query=seen_from, per_direction=options.per_direction)
    panels = [panel("effective receptive field (input gradient)", gradient[0].abs().sum(0).cpu())]
    panels += [panel(title, combine(heats, pixels.shape[2:])[0]) for title, heats in found]
    corner = f"{cut.shape[1]} x {cut.shape[0]} from {left}, {top}"
    facts = {"picture": options.picture, "weights": weights, "pixel": f"{x}, {y}", "window": corner,
             "method": options.method}  # fmt: skip
    title = f"Which pixels repaired {x}, {y} of {options.picture.name}"
    write_page(options.output, title, panels, facts=facts, reading=READING)
    return 0
