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

let rater = localStorage.getItem(STORED);
let turn = null;
let shownAt = 0;
let isSending = false;

async function call(path, body) {
  const headers = {"Content-Type": "application/json"};
  if (rater) headers["X-Rater"] = rater;
  const options = body === undefined ? {headers} : {method: "POST", headers, body: JSON.stringify(body)};
  const response = await fetch(path, options);
  const answer = await response.json();
  if (!response.ok) {
    const error = new Error(answer.detail || "The server did not understand.");
    error.status = response.status;
    throw error;
  }
  return answer;
}

async function retry(work) {
  for (let wait = 500; ; wait = Math.min(wait * 2, 8000)) {
    try {
      const result = await work();
      $("message").textContent = "";
      return result;
    } catch (error) {
      if (error.status && error.status < 500) throw error;
      $("message").textContent = "No connection. Trying again…";
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }
}

function show(section) {
  for (const id of ["welcome", "pair", "end"]) $(id).hidden = id !== section;
}

async function loadVideo(video, side) {
  const response = await fetch(`/api/video/${turn.trial}/${side}`, {headers: {"X-Rater": rater}});
  if (!response.ok) throw new Error("A video could not be loaded.");
  if (video.src) URL.revokeObjectURL(video.src);
  video.src = URL.createObjectURL(await response.blob());
  await new Promise((resolve, reject) => {
    video.oncanplaythrough = resolve;
    video.onerror = () => reject(new Error("This browser cannot play the video."));
  });
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
  update();
  show("pair");
  $("pair").setAttribute("aria-busy", "true");
  await retry(() => Promise.all([loadVideo(videos[0], "first"), loadVideo(videos[1], "second")]));
  $("pair").removeAttribute("aria-busy");
  shownAt = performance.now();
  restart();
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
  for (const field of $("ballot").children) field.classList.toggle("current", field.name === open);
  $("send").disabled = open !== undefined || isSending;
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
  if (current() || isSending) return;
  isSending = true;
  update();
  const seconds = (performance.now() - shownAt) / 1000;
  const ballot = {trial: turn.trial, ...answers(), seconds: Math.min(seconds, 86400)};
  try {
    const next = await retry(() => call("/api/votes", ballot));
    isSending = false;
    await present(next);
  } catch (error) {
    isSending = false;
    fail(error);
  }
  update();
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
  action();
}

async function begin() {
  try {
    const joined = await call(`/api/s/${LINK}/raters`, {});
    rater = joined.rater;
    localStorage.setItem(STORED, rater);
    await present(await retry(() => call("/api/next")));
  } catch (error) {
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
  try {
    await present(await retry(() => call("/api/next")));
  } catch (error) {
    if (error.status === 404) show("welcome");
    else fail(error);
  }
}

start();
