// The page is a client of the public API and of nothing else. No library, no build step, no other host.

const $ = (id) => document.getElementById(id);
const ENDED = new Set(["completed", "failed", "cancelled"]);

const cards = new Map(); // id of a video -> its card
const photos = new Map(); // id of a video -> the photo it was asked for with, while this page is open
const files = new Map(); // id of a video -> object URL of its mp4
const portraits = new Map(); // id of a video -> object URL of the portrait that was drawn for it
let chosen = null; // the photo
let lastShown = null; // cursor of the history
const compared = []; // ids, at most two

$("key").value = sessionStorage.getItem("key") ?? "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value);
  start();
});

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({}));
  const wait = answer.headers.get("Retry-After");
  const error = new Error(
    (body.error?.message ?? `The server answered ${answer.status}`) + (wait ? ` (in about ${wait} s)` : ""),
  );
  error.status = answer.status;
  throw error;
}

const askJson = async (path, options) => (await ask(path, options)).json();

// What to make

function showPhoto(file) {
  chosen = file ?? null;
  const image = $("photo-shown");
  if (image.src) URL.revokeObjectURL(image.src);
  image.hidden = !chosen;
  if (chosen) {
    image.src = URL.createObjectURL(chosen);
    image.alt = `The chosen photo, ${chosen.name}`;
    $("character").value = "";
    $("forget").disabled = true;
  } else {
    image.removeAttribute("src");
  }
}

$("photo").addEventListener("change", () => showPhoto($("photo").files[0]));
for (const [event, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  $("drop").addEventListener(event, (happening) => {
    happening.preventDefault();
    $("drop").classList.toggle("over", over);
    if (event === "drop" && happening.dataTransfer.files[0]) showPhoto(happening.dataTransfer.files[0]);
  });
}
$("character").addEventListener("change", () => {
  $("forget").disabled = !$("character").value;
  if ($("character").value) {
    $("photo").value = "";
    showPhoto(null);
  }
});

function order() {
  const form = new FormData();
  form.set("prompt", $("prompt").value);
  const words = $("identity-prompt").value.trim();
  if (words) form.set("identity_prompt", words);
  for (const name of ["size", "num_frames", "num_inference_steps", "guidance_scale", "seed", "plan"]) {
    const value = $(name).value.trim();
    if (value) form.set(name, value);
  }
  return form;
}

async function submit(form, photo) {
  if (photo) form.set("input_reference", photo);
  const video = await askJson("v1/videos", { method: "POST", body: form });
  if (photo) photos.set(video.id, photo);
  show(video, true);
  cards.get(video.id).scrollIntoView({ block: "nearest" });
  follow(video.id);
  return video;
}

async function trying(button, work) {
  $("trouble").hidden = true;
  button.disabled = true;
  try {
    await work();
  } catch (error) {
    if (error.status === 401) $("access").open = true;
    $("trouble").textContent = error.message;
    $("trouble").hidden = false;
  } finally {
    button.disabled = false;
  }
}

$("order").addEventListener("submit", (event) => {
  event.preventDefault();
  trying($("make"), async () => {
    const form = order();
    const character = $("character").value;
    if (!chosen && !character) {
      const words = form.get("identity_prompt");
      if (!words) throw new Error("Choose a photo, or someone you registered, or say what the person looks like.");
      form.set("portrait_prompt", words);
    }
    if (character) form.set("character", character);
    await submit(form, character ? null : chosen);
  });
});

// People

async function showCharacters(select = "") {
  const { data } = await askJson("v1/characters?limit=100");
  const options = data
    .filter((one) => one.status !== "failed")
    .map((one) => new Option(one.name || one.id, one.id, false, one.id === select));
  $("character").replaceChildren(new Option("nobody", ""), ...options);
  $("forget").disabled = !$("character").value;
}

$("register").addEventListener("click", () =>
  trying($("register"), async () => {
    if (!chosen) throw new Error("Choose the photo to register first.");
    const form = new FormData();
    form.set("input_reference", chosen);
    form.set("name", $("name").value.trim());
    form.set("identity_prompt", $("identity-prompt").value.trim());
    const made = await askJson("v1/characters", { method: "POST", body: form });
    await showCharacters(made.id);
    $("character").dispatchEvent(new Event("change"));
    $("name").value = "";
  }),
);
$("forget").addEventListener("click", () =>
  trying($("forget"), async () => {
    await ask(`v1/characters/${$("character").value}`, { method: "DELETE" });
    await showCharacters();
  }),
);

// Videos

function seconds(count) {
  return count >= 90 ? `${Math.round(count / 60)} min` : `${Math.max(1, Math.round(count))} s`;
}

function stateOf(video) {
  if (video.status === "queued") {
    const before = video.queue_position ?? 0;
    return before ? `Waiting, ${before} before it` : "Waiting, it is next";
  }
  if (video.status !== "in_progress") return "";
  if (video.cancel_requested) return "Stopping…";
  const { stage, done, total, eta_s: left } = video.stage ?? {};
  const names = { identity: "Looking at the photo", text: "Reading the prompt", schedule: "Reading the prompt" };
  names.portrait = `Drawing the portrait, ${done} of ${total}`;
  const what = { denoise: `Step ${done} of ${total}`, decode: "Drawing the frames" }[stage] ?? names[stage];
  return (what ?? "Starting") + (left ? `, about ${seconds(left)} left` : "");
}

function show(video, first = false) {
  let card = cards.get(video.id);
  if (!card) {
    card = $("card").content.firstElementChild.cloneNode(true);
    card.id = video.id;
    card.addEventListener("click", (event) => act(event, video.id));
    cards.set(video.id, card);
    $("videos")[first ? "prepend" : "append"](card);
    $("none").hidden = true;
  }
  card.video = video;
  const find = (selector) => card.querySelector(selector);
  find("h3").textContent = video.prompt;
  find(".facts").textContent =
    `${video.size}, ${video.num_frames} frames, ${video.num_inference_steps} steps, seed ${video.seed}` +
    (video.plan ? ", under a plan" : "");
  const ended = ENDED.has(video.status);
  find(".going").hidden = ended;
  find("progress").value = video.progress;
  find("progress").setAttribute("aria-label", `Progress of ${video.prompt}`);
  find(".state").textContent = stateOf(video);
  if (video.preview) {
    find(".preview").src = video.preview;
    find(".preview").hidden = false;
  }
  const trouble = find(".trouble");
  trouble.hidden = !(video.error || video.status === "cancelled");
  trouble.textContent = video.error?.message ?? "Cancelled.";
  find("[data-do=cancel]").hidden = ended || video.cancel_requested;
  if (video.status === "completed") loadFile(video.id);
  const again = photos.has(video.id) || video.character || video.portrait_prompt;
  find("[data-do=exact]").hidden = !(video.status === "completed" && video.plan && again);
}

async function loadFile(id) {
  const card = cards.get(id);
  const screen = card.querySelector("video");
  if (files.has(id)) return;
  files.set(id, "");
  try {
    const url = URL.createObjectURL(await (await ask(`v1/videos/${id}/content`)).blob());
    files.set(id, url);
    screen.src = url;
    screen.hidden = false;
    const save = card.querySelector("[data-do=save]");
    save.href = url;
    save.download = `${id}.mp4`;
    save.hidden = false;
    card.querySelector("[data-do=compare]").hidden = false;
    if (card.video.portrait_prompt) {
      portraits.set(id, URL.createObjectURL(await (await ask(`v1/videos/${id}/portrait`)).blob()));
      card.querySelector(".portrait").src = portraits.get(id);
      card.querySelector(".portrait").hidden = false;
    }
  } catch {
    files.delete(id);
  }
}

async function act(event, id) {
  const button = event.target.closest("button[data-do]");
  if (!button) return;
  const { video } = cards.get(id);
  await trying(button, async () => {
    switch (button.dataset.do) {
      case "cancel":
        show(await askJson(`v1/videos/${id}/cancel`, { method: "POST" }));
        break;
      case "delete":
        await ask(`v1/videos/${id}`, { method: "DELETE" });
        remove(id);
        break;
      case "exact": {
        const form = new FormData();
        const kept = ["prompt", "identity_prompt", "size", "num_frames", "fps", "num_inference_steps", "seed"];
        for (const name of [...kept, "guidance_scale"]) form.set(name, video[name]);
        if (video.character) form.set("character", video.character);
        if (video.portrait_prompt) form.set("portrait_prompt", video.portrait_prompt);
        await submit(form, video.character ? null : photos.get(id));
        break;
      }
      case "compare":
        compare(id);
        break;
    }
  });
}

function remove(id) {
  cards.get(id)?.remove();
  cards.delete(id);
  photos.delete(id);
  if (lastShown === id) lastShown = [...cards.keys()].at(-1) ?? null; // the cursor has to be there
  for (const urls of [files, portraits]) {
    if (urls.get(id)) URL.revokeObjectURL(urls.get(id));
    urls.delete(id);
  }
  if (compared.includes(id)) compare(id);
  $("none").hidden = cards.size > 0;
}

// Server-sent events, read by hand: EventSource can't send a key.
// A browser has six connections for a host; most must stay free for everything else.
const STREAMS = 2;
const followed = new Set();
let streams = 0;

async function follow(id) {
  if (followed.has(id)) return;
  followed.add(id);
  try {
    await followToTheEnd(id);
  } finally {
    followed.delete(id);
  }
}

async function followToTheEnd(id) {
  for (;;) {
    const streaming = streams < STREAMS;
    try {
      if (!streaming) {
        const video = await askJson(`v1/videos/${id}`);
        if (cards.has(id)) show(video);
      } else {
        streams += 1;
        try {
          await readEvents(id);
        } finally {
          streams -= 1;
        }
      }
    } catch (error) {
      if (error.status === 404) return remove(id);
      if (error.status === 401) return;
    }
    if (!cards.has(id) || ENDED.has(cards.get(id).video.status)) return;
    await new Promise((resolve) => setTimeout(resolve, 1000)); // a look a second, or the server went away
  }
}

async function readEvents(id) {
  const answer = await ask(`v1/videos/${id}/events?preview=true`);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find((each) => each.startsWith("data: "));
      if (line && cards.has(id)) show(JSON.parse(line.slice(6)));
    }
  }
}

// Two side by side

function compare(id) {
  const at = compared.indexOf(id);
  if (at >= 0) compared.splice(at, 1);
  else compared.push(id);
  if (compared.length > 2) compared.shift();
  for (const [each, card] of cards) {
    card.querySelector("[data-do=compare]").setAttribute("aria-pressed", String(compared.includes(each)));
  }
  const both = compared.length === 2;
  $("comparison").hidden = !both;
  if (!both) return;
  for (const [side, each] of [["left", compared[0]], ["right", compared[1]]]) {
    const { video } = cards.get(each);
    $(side).src = files.get(each);
    $(side).parentElement.querySelector("figcaption").textContent =
      `${video.prompt} (seed ${video.seed}, ${video.plan ? "under a plan" : "exact"})`;
  }
  $("comparison").scrollIntoView({ block: "nearest" });
}

$("play-both").addEventListener("click", () => {
  const playing = !$("left").paused;
  for (const side of ["left", "right"]) {
    $(side).currentTime = $("left").currentTime;
    if (playing) $(side).pause();
    else $(side).play();
  }
  $("play-both").textContent = playing ? "Play both" : "Pause both";
});
$("position").addEventListener("input", () => {
  for (const side of ["left", "right"]) {
    $(side).pause();
    $(side).currentTime = (($(side).duration || 0) * $("position").value) / 1000;
  }
  $("play-both").textContent = "Play both";
});
$("close-comparison").addEventListener("click", () => [...compared].forEach(compare));

// Start

async function history() {
  const { data, last_id: last, has_more: more } = await askJson(
    `v1/videos?limit=12${lastShown ? `&after=${lastShown}` : ""}`,
  );
  lastShown = last ?? lastShown;
  $("more").hidden = !more;
  for (const video of data) {
    show(video);
    if (!ENDED.has(video.status)) follow(video.id);
  }
}

$("more").addEventListener("click", () => trying($("more"), history));

async function start() {
  try {
    const { data } = await askJson("v1/models");
    const ready = (await fetch("readyz")).ok;
    $("server").textContent = `${data[0].id}: ${ready ? "ready" : "getting ready"}`;
    lastShown = null;
    await Promise.all([showCharacters(), history()]);
  } catch (error) {
    $("access").open = error.status === 401;
    $("server").textContent = error.message;
  }
}

start();
