"use strict";

// Videos of an element have one clock, that of the first: the others follow it.
const MAX_DRIFT = .06;  // seconds, half a frame at 8 frames a second

function playInStep(row) {
  const videos = [...row.querySelectorAll("video")], clock = videos[0];
  const button = row.querySelector(".player button"), slider = row.querySelector(".player input");
  const time = row.querySelector(".time");

  function seek(seconds) { for (const video of videos) video.currentTime = seconds; }

  function show() {
    slider.value = clock.currentTime;
    time.textContent = `${clock.currentTime.toFixed(1)} of ${clock.duration.toFixed(1)} s`;
  }

  function follow() {
    if (clock.paused) return;
    for (const video of videos) {
      if (Math.abs(video.currentTime - clock.currentTime) > MAX_DRIFT) video.currentTime = clock.currentTime;
    }
    show();
    requestAnimationFrame(follow);
  }

  async function play() {
    button.textContent = "Pause";
    if (clock.ended) seek(0);
    await Promise.allSettled(videos.map((video) => video.play()));
    follow();
  }

  function pause() {
    button.textContent = "Play";
    for (const video of videos) video.pause();
    seek(clock.currentTime);
  }

  function start() {
    for (const video of videos) video.controls = false;
    row.querySelector(".player").hidden = false;
    slider.max = clock.duration;
    show();
    button.addEventListener("click", () => clock.paused ? play() : pause());
    slider.addEventListener("input", () => { pause(); seek(Number(slider.value)); show(); });
    clock.addEventListener("seeked", show);
    clock.addEventListener("ended", () => { seek(0); play(); });
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) play();
  }

  if (clock.readyState >= 1) start();
  else clock.addEventListener("loadedmetadata", start, {once: true});
}
