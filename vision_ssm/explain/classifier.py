"""Classifiers: maps of one picture, and the perturbation test over a labelled set."""

import json
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_ssm.classify.model import Classifier, normalized
from vision_ssm.classify.train import read_squares
from vision_ssm.data.images import read_image
from vision_ssm.data.labelled import find_labelled, to_square
from vision_ssm.errors import UserError
from vision_ssm.explain import Method
from vision_ssm.explain.maps import combine, make_maps
from vision_ssm.explain.options import ClassifyOptions, PerturbOptions
from vision_ssm.explain.page import Panel, write_page
from vision_ssm.explain.perturb import perturbation_test
from vision_ssm.explain.recording import Layer, Recording, record
from vision_ssm.files import check_writable, write_text

READING = (
    "Bright places count most. Attribution: how much each place changed the score of the class through the scans, for "
    "or against it. Raw and roll-out: what the class token reads, or all places in the mean, whatever the class is.",
    "The maps show scans and attention alone; convolutions between them have moved information by a few cells.",
)


def class_token(recording: Recording, target: Tensor, batch: int) -> int | None:
    """Where the class token stands in the sequences of the last layer: the only position that the target reads there.

    None where the target reads several (a mean over all places), or where the last layer reads a map.
    """
    layer = recording.layers[-1]
    reached = torch.zeros(layer.places, dtype=torch.bool)
    for mixing in layer.mixings:
        (gradient,) = torch.autograd.grad(target.sum(), mixing.output, retain_graph=True, allow_unused=True)
        if gradient is not None:
            reached[mixing.index().cpu().flatten()] |= mixing.output_of(0, gradient).ne(0).any(-1).cpu().flatten()
    places = reached.view(batch, -1).any(0).nonzero().flatten().tolist()
    return places[0] if layer.grid is None and len(places) == 1 else None


def heats_of(
    network: nn.Module, batch: Tensor, method: Method, *, labels: Sequence[int] | None = None, layer: str = "all",
    per_direction: bool = False,
) -> tuple[list[tuple[str, Tensor]], Tensor]:  # fmt: skip
    """Maps of a batch as (title, (B, H, W)), and the logits.

    Args:
        network: in eval mode.
        batch: (B, C, H, W) as the network takes it.
        method: which maps.
        labels: classes to explain; by default the likeliest of each picture.
        layer: see `Recording.select`.
        per_direction: see `make_maps`.
    """
    with torch.enable_grad(), record(network) as recording:
        logits = network(batch.detach().requires_grad_())
    chosen = logits.argmax(1) if labels is None else torch.tensor(labels, device=logits.device)
    target = logits.gather(1, chosen[:, None])[:, 0]
    place = class_token(recording, target, len(batch))

    def tokens_of(layer: Layer) -> int:
        return layer.places // len(batch)

    def query(at: Layer) -> list[int] | None:
        return None if place is None or at.grid else [place]

    found = make_maps(
        recording.select(layer), method, target=target, query=query, batch=len(batch), per_direction=per_direction
    )
    last = tokens_of(recording.layers[-1])
    tokens = None if place is None else [i for i in range(last) if i != place]
    return [(title, combine(heats, batch.shape[-2:], tokens=tokens)) for title, heats in found], logits.detach()


def run_explain(options: ClassifyOptions) -> int:
    """Write maps for one picture.

    Raises:
        UserError: no such weights, picture, class or layer.
    """
    name, picture = options.name, options.picture
    classifier = Classifier.load(options.weights, device=options.device)
    if name is not None and name not in classifier.classes:
        raise UserError(f"there is no class {name!r}; these weights know {', '.join(classifier.classes)}")
    square = to_square(read_image(picture), classifier.side)
    batch = _batch(classifier, square[None])
    labels = None if name is None else [classifier.classes.index(name)]
    maps, logits = heats_of(
        classifier.network, batch, options.method, labels=labels, layer=options.layer,
        per_direction=options.per_direction,
    )  # fmt: skip
    label = int(logits[0].argmax()) if labels is None else labels[0]
    what = f"{classifier.classes[label]} {float(logits[0].softmax(0)[label]):.2f}"
    panels = [Panel(f"{what}: {title}", heat[0].numpy(), square) for title, heat in maps]
    facts = {"picture": picture, "weights": options.weights, "class": what, "method": options.method,
             "layers": options.layer}  # fmt: skip
    write_page(options.output, f"What {what} was seen by in {picture.name}", panels, facts=facts, reading=READING)
    return 0


def run_perturb(options: PerturbOptions) -> int:
    """Print the perturbation test of a classifier's maps.

    Raises:
        UserError: no such weights or pictures, more cells than pixels, or a folder as output.
    """
    output, cells, seed = options.output, options.cells, options.seed
    if output is not None:
        if output.is_dir():
            raise UserError(f"output is the folder {output}; give a file such as {output / 'test.json'}")
        check_writable(output.parent)
    classifier = Classifier.load(options.weights, device=options.device)
    if cells > classifier.side:
        raise UserError(f"cells must be at most the pictures' {classifier.side} pixels, got {cells}")
    pictures = find_labelled(options.data, "val", classifier.classes)
    drawn = np.random.default_rng(seed).permutation(len(pictures))[: options.count]
    squares = read_squares(pictures, classifier.side)[drawn]
    images, labels = _batch(classifier, squares), torch.from_numpy(pictures.labels[drawn]).long()
    results = {}
    for method in options.method:
        parts = [
            heats_of(classifier.network, part, method, layer=options.layer)[0][0][1]
            for part in images.split(options.batch_size)
        ]
        test = perturbation_test(
            classifier.network, images, labels, F.adaptive_avg_pool2d(torch.cat(parts), cells),
            blank=images.mean((0, 2, 3), keepdim=True), seed=seed,
        )  # fmt: skip
        results[method] = test.auc()
    print(f"{len(images)} pictures; mean accuracy in % with 10 to 90 % of the {cells} x {cells} cells blanked")
    print(f"{'':14}{'most first':>12}{'at random':>12}{'least first':>12}")
    for method, auc in results.items():
        print(f"{method:14}{auc['positive']:12.1f}{auc['random']:12.1f}{auc['negative']:12.1f}")
    if output is not None:
        write_text(output, json.dumps({"pictures": len(images), "seed": seed, "auc": results}, indent=2) + "\n")
    return 0


def _batch(classifier: Classifier, squares: np.ndarray) -> Tensor:
    """(n, S, S, 3) uint8 as the network takes them, on its device."""
    device = next(classifier.network.parameters()).device
    return normalized(torch.from_numpy(np.ascontiguousarray(squares)).permute(0, 3, 1, 2)).to(device)
