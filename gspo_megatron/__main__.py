"""`python -m gspo_megatron COMMAND …`."""

from __future__ import annotations

import sys

from gspo_megatron.cli import main

sys.exit(main())
