# SPDX-License-Identifier: Apache-2.0
"""Files to frames: pictures are padded to a square, videos are squeezed."""

import numpy as np
import pytest
from PIL import Image

from slowfast_jax.errors import UserError
from slowfast_jax.generate.video import read_media
from tests.data.video_files import VideoSpec, write_video
from tests.generate.tiny import SIZE, make_export


def test_a_picture_is_one_padded_frame(tmp_path):
  wide = np.full((SIZE // 2, SIZE, 3), 255, np.uint8)
  Image.fromarray(wide).save(tmp_path / "wide.PNG")
  frames = read_media(tmp_path / "wide.PNG", make_export())
  assert frames.images.shape == (1, SIZE, SIZE, 3)
  quarter = SIZE // 4
  assert (frames.images[0, quarter:-quarter] == 255).all()
  # SigLIP's mean colour.
  assert (frames.images[0, :quarter] == 127).all()
  assert frames.timestamps.tolist() == [0.0]


def test_a_video_is_its_frames(tmp_path):
  write_video(tmp_path / "a.mp4", VideoSpec(num_frames=10))
  frames = read_media(str(tmp_path / "a.mp4"), make_export())
  assert frames.images.shape == (8, SIZE, SIZE, 3)
  # The red corner is where it was: nothing is padded.
  assert frames.images[0, 1, 1, 0] > 180
  assert frames.images[0, 1, 1, 1] < 60
  assert frames.duration == pytest.approx(0.4)


def test_files_that_cannot_be_read(tmp_path):
  (tmp_path / "a.jpg").write_bytes(b"no picture")
  with pytest.raises(UserError, match="a.jpg: not a picture that can be read"):
    read_media(tmp_path / "a.jpg", make_export())
  with pytest.raises(UserError, match="none.png: there is no such file"):
    read_media(tmp_path / "none.png", make_export())
  with pytest.raises(UserError, match="none.mp4: there is no such file"):
    read_media(tmp_path / "none.mp4", make_export())
