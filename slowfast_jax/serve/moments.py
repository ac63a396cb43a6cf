# SPDX-License-Identifier: Apache-2.0
"""The page's timeline: thumbnails over attention in time; a click on a moment shows its frame."""

import base64
import html
import io

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from slowfast_jax.serve.decode import DecodedMedia

# Thumbnails of a row; each stands for a stretch of time, by its most read frame.
_STRIP = 12
_LARGE_PIXELS = 480

CSS = """
& { font-variant-numeric: tabular-nums; }
button, span, img { margin: 0 !important; }
.moments { display: grid; gap: 10px; }
.large { display: grid; grid-template-columns: minmax(0, 300px) 1fr; gap: 14px;
  align-items: center; }
.large img { width: 100%; border-radius: 8px; display: block; margin: 0;
  background: var(--background-fill-secondary); }
.at { font-size: 1.3rem; font-weight: 600; }
.share { color: var(--neutral-500); margin-bottom: 8px; }
.step button { min-width: 44px; min-height: 44px; border-radius: 8px; cursor: pointer;
  border: 1px solid var(--border-color-primary); background: var(--background-fill-secondary); }
.bars { display: flex; height: 110px; align-items: stretch; touch-action: pan-y;
  border-bottom: 1px solid var(--border-color-primary); }
.bars button { flex: 1 1 0; min-width: 0; padding: 0 0.5px; border: 0; background: none;
  line-height: 0; display: flex; align-items: flex-end; cursor: pointer; }
.bars button span { width: 100%; min-height: 2px; border-radius: 2px 2px 0 0; background: #93c5fd;
  display: block; }
.bars button:hover span { background: #3b82f6; }
.bars button[aria-pressed=true] span { background: #1d4ed8; }
.bars button[aria-pressed=true] { background: rgb(59 130 246 / 0.15); }
.ends { display: flex; justify-content: space-between; gap: 8px; font-size: 0.8rem;
  color: var(--neutral-500); }
.strip { display: flex; gap: 6px; overflow-x: auto; padding: 3px; }
.strip button { flex: 1 0 64px; max-width: 120px; padding: 0; border: 0; background: none;
  cursor: pointer; border-radius: 6px; }
.strip img { width: 100%; display: block; border-radius: 6px; margin: 0; }
.strip button.near { outline: 3px solid #1d4ed8; }
@media (max-width: 640px) {
  .large { grid-template-columns: minmax(0, 55%) 1fr; gap: 10px; }
  .bars { height: 84px; }
}
"""

# The listener stands at the element, which stays while what is in it is replaced.
ON_LOAD = """
const show = (number) => {
  const bars = [...element.querySelectorAll('.bars button')];
  if (!bars.length) return;
  const at = Math.min(Math.max(number, 0), bars.length - 1), bar = bars[at];
  bars.forEach((other, i) => other.setAttribute('aria-pressed', i === at));
  element.querySelector('.large img').src = bar.dataset.frame;
  element.querySelector('.at').textContent = bar.dataset.at;
  element.querySelector('.share').textContent = bar.dataset.share;
  element.querySelectorAll('.strip button').forEach((thumb) =>
    thumb.classList.toggle('near', at >= +thumb.dataset.first && at <= +thumb.dataset.last));
  const video = document.querySelector('#clip video');
  if (video) { video.pause(); video.currentTime = +bar.dataset.seconds; }
};
element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (!button) return;
  const now = [...element.querySelectorAll('.bars button')]
    .findIndex((bar) => bar.getAttribute('aria-pressed') === 'true');
  show(button.dataset.step ? now + +button.dataset.step : +button.dataset.number);
});
"""


def render_moments(frames: DecodedMedia, profile: Float[np.ndarray, " F"]) -> str:
  """The timeline as HTML; the moment that was read most is shown first.

  Args:
    frames: what the model saw.
    profile: each frame's share of the attention; sums to 1.
  """
  pictures = [_data_url(image) for image in frames.images]
  peak, top = int(np.argmax(profile)), max(float(profile.max()), 1e-9)
  words = [
    (_clock(float(time)), f"{100 * float(share):.0f}% of what the answer was read from")
    for time, share in zip(frames.timestamps, profile)
  ]
  bars = "".join(
    f'<button data-number="{i}" data-frame="{pictures[i]}" data-at="{at}" data-share="{share}" '
    f'data-seconds="{float(frames.timestamps[i]):.3f}" aria-pressed="{str(i == peak).lower()}" '
    f'aria-label="{at}, {share}"><span style="height:{100 * float(profile[i]) / top:.1f}%"></span>'
    "</button>"
    for i, (at, share) in enumerate(words)
  )
  strip = "".join(_thumbnail(part, pictures, profile, peak) for part in _stretches(len(profile)))
  end = _clock(max(frames.duration, float(frames.timestamps[-1])))
  return (
    '<div class="moments">'
    f'<div class="large"><img alt="The chosen frame" src="{pictures[peak]}"><div>'
    f'<div class="at">{words[peak][0]}</div><div class="share">{words[peak][1]}</div>'
    '<div class="step"><button data-step="-1" aria-label="Earlier frame">&#8592;</button> '
    '<button data-step="1" aria-label="Later frame">&#8594;</button></div></div></div>'
    f'<div class="strip">{strip}</div><div class="bars">{bars}</div>'
    '<div class="ends"><span>0:00.0</span>'
    f"<span>each frame&#8217;s part in the answer; click a moment</span><span>{end}</span></div>"
    "</div>"
  )


def _stretches(count: int) -> list[np.ndarray]:
  return np.array_split(np.arange(count), min(_STRIP, count))


def _thumbnail(
  part: np.ndarray, pictures: list[str], profile: Float[np.ndarray, " F"], peak: int
) -> str:
  best = int(part[np.argmax(profile[part])])
  near = ' class="near"' if peak in part else ""
  return (
    f'<button data-number="{best}" data-first="{part[0]}" data-last="{part[-1]}"{near}>'
    f'<img alt="Frame {best + 1}" src="{pictures[best]}"></button>'
  )


def _data_url(image: UInt8[np.ndarray, "h w C"]) -> str:
  picture = Image.fromarray(image)
  picture.thumbnail((_LARGE_PIXELS, _LARGE_PIXELS))
  file = io.BytesIO()
  picture.save(file, "JPEG", quality=80)
  return html.escape(f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}")


def _clock(seconds: float) -> str:
  minutes, rest = divmod(round(seconds, 1), 60)
  hours, minutes = divmod(int(minutes), 60)
  return f"{hours}:{minutes:02d}:{rest:04.1f}" if hours else f"{minutes}:{rest:04.1f}"
