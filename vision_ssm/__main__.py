"""`python -m vision_ssm` is `vssm`."""

import sys

from vision_ssm.cli import main

sys.exit(main())
