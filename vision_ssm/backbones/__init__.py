"""Backbones that scan instead of attending, for timm: importing this package registers `vssm_vim_*`, `vssm_vmamba_*`.

    import timm, vision_ssm.backbones
    model = timm.create_model("vssm_vmamba_tiny", features_only=True)

The detector's backbone is registered by `import detection.backbone`.
"""

from vision_ssm.backbones.vim import Vim
from vision_ssm.backbones.vmamba import VMamba

__all__ = ["VMamba", "Vim"]
