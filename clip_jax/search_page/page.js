"use strict";
// Results come as JSON and are put into the page as text, never as HTML.
const at = (id) => document.getElementById(id);
const made = (tag, className, text) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};
let chosen = null; // the picture to name: {row} or {file}
let withPictures = true;
let asked = 0; // of two questions the later one's answer stays

async function ask(address, options) {
  const response = await fetch(address, options);
  const answer = await response.json().catch(() => ({ error: `the server said ${response.status}` }));
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

function tell(id, text, isWrong = false) {
  at(id).textContent = text;
  at(id).classList.toggle("wrong", isWrong);
}

async function find(address, options, what) {
  const turn = ++asked;
  tell("status", "Searching…");
  try {
    const start = performance.now();
    const { hits } = await ask(address, options);
    if (turn !== asked) return;
    const took = Math.round(performance.now() - start);
    at("hits").replaceChildren(...hits.map(hitItem));
    tell("status", `${hits.length} nearest to ${what}, in ${took} ms`);
  } catch (error) {
    if (turn === asked) tell("status", error.message, true);
  }
}

function hitItem(hit) {
  const item = made("li", "hit");
  const frame = made("div", "frame", withPictures ? undefined : "no picture");
  if (withPictures) {
    const image = made("img");
    image.alt = hit.caption || hit.path;
    image.src = `/picture/${hit.row}`;
    image.addEventListener("error", () => frame.replaceChildren("no picture"));
    frame.append(image);
  }
  const caption = made("div", "caption", hit.caption || hit.path);
  caption.title = hit.path;
  const like = made("button", "small", "more like it");
  like.type = "button";
  like.addEventListener("click", () =>
    find(`/search?row=${hit.row}`, {}, `“${hit.caption || hit.path}”`));
  const name = made("button", "small", "name it");
  name.type = "button";
  name.addEventListener("click", () => {
    choose({ row: hit.row }, withPictures ? `/picture/${hit.row}` : "", hit.caption || hit.path);
    at("labels").focus();
  });
  item.append(frame, caption, made("div", "score", hit.score.toFixed(4)), like, name);
  return item;
}

function choose(what, source, alt) {
  chosen = what;
  const image = made("img");
  image.alt = alt;
  image.src = source;
  at("shown").replaceChildren(source ? image : made("p", "", alt));
  at("bars").replaceChildren();
  tell("name-status", "");
}

async function name(event) {
  event.preventDefault();
  if (!chosen) return tell("name-status", "Choose a picture first.", true);
  const labels = at("labels").value.split("\n").map((s) => s.trim()).filter(Boolean);
  const wanted = new URLSearchParams(labels.map((label) => ["label", label]));
  wanted.set("template", at("template").value);
  if ("row" in chosen) wanted.set("row", chosen.row);
  tell("name-status", "Naming…");
  try {
    const { shares } = await ask(`/classify?${wanted}`, { method: "POST", body: chosen.file });
    const order = labels.map((_, i) => i).sort((a, b) => shares[b] - shares[a]);
    at("bars").replaceChildren(...order.map((i) => barItem(labels[i], shares[i])));
    tell("name-status", `Most likely: ${labels[order[0]]}`);
  } catch (error) {
    tell("name-status", error.message, true);
  }
}

function barItem(label, share) {
  const item = made("li", "bar");
  const track = made("div", "track");
  const fill = made("div", "fill");
  fill.style.width = `${100 * share}%`;
  track.setAttribute("aria-hidden", "true");
  track.append(fill);
  item.append(made("b", "", label), track, made("span", "share", `${(100 * share).toFixed(1)} %`));
  return item;
}

async function start() {
  at("find").addEventListener("submit", (event) => {
    event.preventDefault();
    const words = at("words").value;
    find(`/search?${new URLSearchParams({ words })}`, {}, `“${words}”`);
  });
  at("by-picture").addEventListener("change", (event) => {
    const file = event.target.files[0];
    if (file) find("/search", { method: "POST", body: file }, `“${file.name}”`);
  });
  at("picture").addEventListener("change", (event) => {
    const file = event.target.files[0];
    if (file) choose({ file }, URL.createObjectURL(file), file.name);
  });
  at("name").addEventListener("submit", name);
  const about = await ask("/about");
  withPictures = !about.no_pictures;
  at("template").value = about.template;
  at("about").textContent = `${about.count.toLocaleString("en")} pictures by ${about.model}, ` +
    `${about.way} search${about.no_pictures ? `; no pictures: ${about.no_pictures}` : ""}`;
}

start().catch((error) => tell("status", error.message, true));
