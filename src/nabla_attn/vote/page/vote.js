"use strict";

const QUESTIONS = {
  semantic: "Which follows the prompt better?",
  visual: "Which looks better, frame by frame?",
  motion: "Which moves better?",
  overall: "Which is better overall?",
};
const ANSWERS = {
  first: "First", second: "Second", both_good: "Both good", both_bad: "Both bad",
};
const LINK = location.pathname.split("/").pop();
const STORED = "rater-" + LINK;
const $ = (id) => document.getElementById(id);
const videos = [$("first"), $("second")];
const WHOM_TO_ASK = "Please tell whoever sent you the link. Your earlier votes are stored.";

let rater = localStorage.getItem(STORED);
let turn = null;
let shownAt = 0;
let isReady = false;

async function request(path, body) {
  const headers = {"Content-Type": "application/json"};
  if (rater) headers["X-Rater"] = rater;
  const options = body === undefined ? {headers} : {method: "POST", headers, body: JSON.stringify(body)};
  const response = await fetch(path, options);
  if (response.ok) return response;
  // What stands between page and server may refuse in words of its own.
  const answer = await response.json().catch(() => ({}));
  const reason = response.status < 500 ? "The server did not understand." : "The server is busy.";
  const error = new Error(answer.detail || reason);
  error.status = response.status;
  throw error;
}

async function call(path, body) { return (await request(path, body)).json(); }

async function retry(work) {
  for (let wait = 500; ; wait = Math.min(wait * 2, 8000)) {
    try {
      const result = await work();
      $("message").textContent = "";
      return result;
    } catch (error) {
      if (error.status && error.status < 500) throw error;
      $("message").textContent = `${error.status ? error.message : "No connection."} Trying again…`;
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }
}

function show(section) {
  for (const id of ["welcome", "pair", "end"]) $(id).hidden = id !== section;
}

async function fetchVideos(trial) {
  const blobs = {};
  const fetchMissing = async (side) => {
    blobs[side] ??= await (await request(`/api/video/${trial}/${side}`)).blob();
  };
  await retry(async () => {
    const results = await Promise.allSettled(videos.map((video) => fetchMissing(video.id)));
    const failed = results.find((result) => result.status === "rejected");
    if (failed) throw failed.reason;
  });
  return blobs;
}

function clear(video) {
  if (!video.src) return;
  URL.revokeObjectURL(video.src);
  video.removeAttribute("src");
  video.load();
}

function showVideo(video, blob) {
  return new Promise((resolve, reject) => {
    video.oncanplaythrough = resolve;
    video.onerror = () => reject(new Error("This browser cannot play it."));
    video.src = URL.createObjectURL(blob);
  });
}

async function load(trial) {
  $("pair").setAttribute("aria-busy", "true");
  videos.forEach(clear);
  try {
    const blobs = await fetchVideos(trial);
    // Another pair may have come meanwhile; under its prompt stand its own videos only.
    if (turn.trial !== trial) return;
    await Promise.all(videos.map((video) => showVideo(video, blobs[video.id])));
    shownAt = performance.now();
    setReady(true);
    restart();
  } catch (error) {
    fail(new Error(`A video of this pair cannot be shown: ${error.message} ${WHOM_TO_ASK}`));
  }
  $("pair").removeAttribute("aria-busy");
}

async function present(next) {
  turn = next;
  $("title").textContent = document.title = turn.title;
  $("bar").max = turn.total;
  $("bar").value = turn.done;
  $("count").textContent = `${turn.done} of ${turn.total}`;
  if (!turn.trial) return show("end");
  $("prompt").textContent = turn.prompt;
  $("ballot").reset();
  setReady(false);
  show("pair");
  await load(turn.trial);
}

function setReady(ready) {
  isReady = ready;
  const parts = document.querySelectorAll("#ballot fieldset, .player button");
  for (const part of parts) part.disabled = !ready;
  update();
}

function isPaused() { return $("play").textContent === "Play"; }

function play() {
  $("play").textContent = "Pause";
  for (const video of videos) video.play().catch(() => {});
}

function pause() {
  $("play").textContent = "Play";
  for (const video of videos) video.pause();
  seek(videos[0].currentTime);
}

function seek(time) { for (const video of videos) video.currentTime = time; }

function restart() { seek(0); play(); }

function step(direction) {
  if (!isPaused()) pause();
  const last = Math.max(0, Math.round(videos[0].duration * turn.fps) - 1);
  const frame = Math.round(videos[0].currentTime * turn.fps - 0.5) + direction;
  // The middle of a frame, so that rounding never shows its neighbour.
  seek((Math.min(Math.max(frame, 0), last) + 0.5) / turn.fps);
}

function watch() {
  if (turn && turn.trial && videos[0].duration) {
    const [first, second] = videos;
    if (first.ended && second.ended && !isPaused()) restart();
    else if (!first.ended && !second.ended && !isPaused()
             && Math.abs(first.currentTime - second.currentTime) > 0.06) {
      second.currentTime = first.currentTime;
    }
    $("frame").textContent = `frame ${Math.floor(first.currentTime * turn.fps + 0.01) + 1}`;
  }
  requestAnimationFrame(watch);
}

function answers() { return Object.fromEntries(new FormData($("ballot"))); }

function current() { return Object.keys(QUESTIONS).find((question) => !answers()[question]); }

function update() {
  const open = current();
  for (const field of $("ballot").children) {
    field.classList.toggle("current", isReady && field.name === open);
  }
  $("send").disabled = !isReady || open !== undefined;
}

function answer(number) {
  const question = current();
  if (!question) return;
  $("ballot").elements[question + "-" + Object.keys(ANSWERS)[number - 1]].checked = true;
  update();
}

function undo() {
  const given = Object.keys(QUESTIONS).filter((question) => answers()[question]);
  if (!given.length) return;
  const last = given[given.length - 1];
  for (const radio of $("ballot").querySelectorAll(`[name="${last}"]`)) radio.checked = false;
  update();
}

async function send() {
  if (current()) return;
  const seconds = (performance.now() - shownAt) / 1000;
  const ballot = {trial: turn.trial, ...answers(), seconds: Math.min(seconds, 86400)};
  setReady(false);
  try {
    await present(await retry(() => call("/api/votes", ballot)));
  } catch (error) {
    if (error.status === 409) return goOn();  // judged in another window
    setReady(true);
    fail(error);
  }
}

function fail(error) { $("message").textContent = error.message; }

function buildBallot() {
  for (const [question, text] of Object.entries(QUESTIONS)) {
    const field = document.createElement("fieldset");
    field.name = question;
    const legend = document.createElement("legend");
    legend.textContent = text;
    const row = document.createElement("div");
    row.className = "answers";
    Object.entries(ANSWERS).forEach(([value, label], index) => {
      const radio = document.createElement("input");
      Object.assign(radio, {type: "radio", name: question, value, id: `${question}-${value}`});
      const name = document.createElement("label");
      name.htmlFor = radio.id;
      const key = document.createElement("kbd");
      key.textContent = index + 1;
      key.setAttribute("aria-hidden", "true");
      name.append(key, " ", label);
      row.append(radio, name);
    });
    field.append(legend, row);
    $("ballot").append(field);
  }
  $("ballot").addEventListener("change", update);
}

function onKey(event) {
  if ($("pair").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
  const actions = {
    " ": () => (isPaused() ? play() : pause()),
    ArrowLeft: () => step(-1), ArrowRight: () => step(1),
    Backspace: undo, Enter: send, r: restart,
  };
  for (const number of [1, 2, 3, 4]) actions[number] = () => answer(number);
  // A focused button keeps its own space and Enter; radios keep neither arrow here.
  if (event.target.tagName === "BUTTON" && [" ", "Enter"].includes(event.key)) return;
  const action = actions[event.key];
  if (!action) return;
  event.preventDefault();
  // A key held a moment too long must not answer the next question too.
  if (isReady && (!event.repeat || event.key.startsWith("Arrow"))) action();
}

async function goOn() {
  try {
    await present(await retry(() => call("/api/next")));
  } catch (error) {
    if (error.status === 404) show("welcome");
    else fail(error);
  }
}

async function begin() {
  $("begin").disabled = true;
  try {
    const joined = await call(`/api/s/${LINK}/raters`, {});
    rater = joined.rater;
    localStorage.setItem(STORED, rater);
    await present(await retry(() => call("/api/next")));
  } catch (error) {
    $("begin").disabled = false;
    fail(error);
  }
}

async function start() {
  buildBallot();
  $("begin").onclick = begin;
  $("play").onclick = () => (isPaused() ? play() : pause());
  $("back").onclick = () => step(-1);
  $("forward").onclick = () => step(1);
  $("restart").onclick = restart;
  $("send").onclick = send;
  document.addEventListener("keydown", onKey);
  requestAnimationFrame(watch);
  if (!rater) return show("welcome");
  await goOn();
}

start();
