"""The restorers by name, for what is stored beside their weights."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from restoration.mambair import MambaIR, MambaIRUNet
from restoration.model import Serpent
from vision_ssm.errors import UserError

Restorer: TypeAlias = Serpent | MambaIR | MambaIRUNet

NETWORKS: dict[str, type[Serpent] | type[MambaIR] | type[MambaIRUNet]] = {
    "serpent": Serpent,
    "mambair": MambaIR,
    "mambair-unet": MambaIRUNet,
}


def build_model(config: Mapping[str, Any]) -> Restorer:
    """An untrained restorer.

    Args:
        config: ``name``, a key of ``NETWORKS``, and the arguments of that class.

    Raises:
        UserError: Unknown name or arguments, or values that the class refuses.
    """
    arguments = dict(config)
    name = arguments.pop("name", None)
    if name not in NETWORKS:
        raise UserError(f"there is no network {name!r}; there are {', '.join(NETWORKS)}")
    try:
        return NETWORKS[name](**arguments)
    except TypeError as error:
        raise UserError(f"the description of the network {name!r} is damaged: {error}") from None


def model_config(model: Restorer) -> dict[str, Any]:
    """What ``build_model`` builds such a model from."""
    name = next(name for name, kind in NETWORKS.items() if type(model) is kind)
    return {"name": name, **model.config}
