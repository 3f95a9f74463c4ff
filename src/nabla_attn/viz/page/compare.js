
const stage = document.querySelector(".stage"), wipe = document.querySelector("#wipe");
const videos = [...stage.querySelectorAll("video")];

function moveWipe() { stage.style.setProperty("--wipe", `${wipe.value}%`); }

function drag(event) {
  const box = stage.getBoundingClientRect();
  wipe.value = 100 * (event.clientX - box.left) / box.width;
  moveWipe();
}

function choose(button) {
  for (const [index, video] of videos.entries()) video.classList.toggle("chosen", index === Number(button.value));
  stage.querySelector(".right").textContent = button.dataset.label;
}

for (const button of document.querySelectorAll("input[type=radio]")) {
  button.addEventListener("change", () => choose(button));
  if (button.checked) choose(button);  // browsers remember the choice of an earlier visit
}
wipe.addEventListener("input", moveWipe);
stage.addEventListener("pointerdown", (event) => { stage.setPointerCapture(event.pointerId); drag(event); });
stage.addEventListener("pointermove", (event) => { if (event.buttons) drag(event); });
moveWipe();
playInStep(document.querySelector(".videos"));
