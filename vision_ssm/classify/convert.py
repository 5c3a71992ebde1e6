"""`vssm classify convert`: published weights of SSM backbones to a classifier's checkpoint folder."""

from pathlib import Path

from timm.data import ImageNetInfo

from vision_ssm.backbones.convert import SIDE, from_official, network_of
from vision_ssm.checkpoint import load_checkpoint, save_checkpoint
from vision_ssm.errors import UserError
from vision_ssm.files import check_new

IMAGENET_CLASSES = 1000


def run_convert(file: str | Path, output: str | Path) -> int:
    """Convert a published file to a folder for `vssm classify` and say what it is. No code in the file is run.

    Of averaged and plain weights in one file the averaged are taken. A file names no classes: 1000 are taken for
    ImageNet's, by the names of its folders (n01440764...), others are called by their numbers.

    Raises:
        UserError: No published Vim or VMamba, or the folder cannot be written.
    """
    published, _ = load_checkpoint(file)
    try:
        weights = from_official(published)
        name, options = network_of(weights)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    classes = options.pop("num_classes")
    labels = ImageNetInfo().label_names() if classes == IMAGENET_CLASSES else [str(i) for i in range(classes)]
    config = {
        "task": "classify",
        "network": {"name": name, "options": options},
        "classes": labels,
        "side": options.get("img_size", SIDE),
        "statistics": "imagenet",
    }
    check_new(output)
    save_checkpoint(output, weights, config)
    described = ", ".join(f"{key} {value}" for key, value in options.items())
    print(f"{output}: {name} ({described}), {classes} classes, {len(weights)} tensors")
    return 0
