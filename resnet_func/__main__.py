"""`python -m resnet_func` is `resnet-func`."""

import sys

from resnet_func.app.cli import main

sys.exit(main())
