"use strict";
const token = location.hash.slice(1);
const $ = (id) => document.getElementById(id);
const LOOK_MS = 300;
let job = null;

async function ask(path, options = {}) {
  const headers = { ...(token ? { Authorization: `Bearer ${token}` } : {}), ...(options.headers || {}) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch {
    throw new Error("the program does not answer; is it still running?");
  }
  if (!answer.ok) {
    const said = await answer.json().catch(() => ({}));
    throw new Error(said.error || `the program answered ${answer.status}`);
  }
  return answer;
}

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").className = isError ? "error" : "";
}

function busy(on) {
  $("draw").disabled = on;
  $("stop").disabled = !on;
  $("progress").hidden = !on;
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read`));
    reader.readAsDataURL(file);
  });
}

async function begin() {
  const model = await (await ask("/api/model")).json();
  $("about").textContent = model.name;
  $("text-field").hidden = $("negative-field").hidden = model.takes !== "text";
  $("class-field").hidden = model.takes !== "class";
  model.classes.forEach((name, i) => $("class").add(new Option(name, String(i))));
  model.samplers.forEach((name) => $("sampler").add(new Option(name, name)));
  $("num_steps").value = model.num_steps;
  $("num_steps").max = model.most.num_steps;
  $("n").max = model.most.n;
  $("draw").disabled = false;
}

async function fields() {
  const asked = {};
  if (!$("text-field").hidden) asked.condition = $("text").value;
  if (!$("negative-field").hidden && $("negative").value) asked.negative = $("negative").value;
  if (!$("class-field").hidden) asked.condition = $("class").value;
  for (const name of ["n", "num_steps", "guidance_scale", "seed", "strength"])
    if ($(name).value !== "") asked[name] = Number($(name).value);
  if ($("sampler").value) asked.sampler = $("sampler").value;
  for (const name of ["image", "mask"])
    if ($(name).files.length) asked[name] = await dataUrl($(name).files[0]);
  return asked;
}

async function link(path, name) {
  const anchor = document.createElement("a");
  anchor.href = URL.createObjectURL(await (await ask(path)).blob());
  anchor.download = name;
  anchor.title = "Download";
  return anchor;
}

async function show(report, words) {
  const batch = document.createElement("div");
  batch.className = "batch";
  const caption = document.createElement("p");
  caption.textContent = words;
  const images = document.createElement("div");
  images.className = "images";
  batch.append(caption, images);
  $("gallery").prepend(batch);
  for (let i = 0; i < report.images; i++) {
    const anchor = await link(`/api/jobs/${report.id}/${i}.png`, `${report.id}_${i}.png`);
    const image = new Image();
    image.src = anchor.href;
    image.alt = `${words}, image ${i + 1}`;
    image.onload = () => image.classList.toggle("small", image.naturalWidth < 128);
    anchor.append(image);
    images.append(anchor);
  }
  if (report.images > 1) {
    const grid = await link(`/api/jobs/${report.id}/grid.png`, `${report.id}_grid.png`);
    grid.textContent = "download as one picture";
    caption.append(" · ", grid);
  }
}

async function follow(words) {
  for (;;) {
    const report = await (await ask(`/api/jobs/${job}`)).json();
    if (report.state === "waiting") say(`waiting, ${report.before} before`);
    if (report.state === "drawing") {
      $("progress").max = report.total || 1;
      $("progress").value = report.done;
      say(report.total ? `step ${report.done} of ${report.total}` : "compiling the sampler …");
    }
    if (report.state === "failed") throw new Error(report.error);
    if (report.state === "stopped") return say("stopped");
    if (report.state === "done") {
      say("");
      return show(report, words);
    }
    await new Promise((resolve) => setTimeout(resolve, LOOK_MS));
  }
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  busy(true);
  say("");
  try {
    const asked = await fields();
    const words = [asked.condition, `seed ${asked.seed ?? 0}`, asked.num_steps && `${asked.num_steps} steps`]
      .filter(Boolean).join(" · ");
    const answer = await ask("/api/jobs", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(asked),
    });
    job = (await answer.json()).id;
    await follow(words);
  } catch (error) {
    say(error.message, true);
  } finally {
    busy(false);
    job = null;
  }
});

$("stop").addEventListener("click", () => {
  if (job) ask(`/api/jobs/${job}`, { method: "DELETE" }).catch((error) => say(error.message, true));
});

begin().catch((error) => say(error.message, true));
