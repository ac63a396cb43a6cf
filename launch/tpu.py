# SPDX-License-Identifier: Apache-2.0
"""Runs on Cloud TPUs: `python launch/tpu.py VERB FILE`; nothing has to be installed for it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slowfast_jax.launch.main import main

sys.exit(main())
