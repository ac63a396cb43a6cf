# SPDX-License-Identifier: Apache-2.0
"""A message that the page explains is one that the program still prints."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^### `([^`]+)`$", PAGE, re.MULTILINE)
CODE = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("slowfast_jax/**/*.py"))
# As messages are: literals that stand one after the other, with fields in braces.
JOINED = re.sub(r'"\s*\n\s*f?"', "", CODE).replace("{extra}", "tpu")


@pytest.mark.parametrize("message", MESSAGES)
def test_explained_message_exists(message):
  assert message in JOINED


def test_messages_were_found():
  assert len(MESSAGES) >= 10
