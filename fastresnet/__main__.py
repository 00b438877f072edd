# SPDX-License-Identifier: Apache-2.0
"""``python -m fastresnet`` is the ``fastresnet`` command."""

import sys

from fastresnet.cli import main

if __name__ == "__main__":
    sys.exit(main())
