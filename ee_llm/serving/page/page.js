// The form of the page, and what happens when it is sent.

import { findDivergence } from "./comparison.js";
import { Pane } from "./pane.js";
import { ServerError, fetchModel, streamTokens } from "./stream.js";
import { Tip } from "./tip.js";

const STRATEGIES = {
  exact: ["Exact early exits", "Each token stops at the first exit that is confident enough. Skipped layers catch up when a later token needs them."],
  full: ["Full model", "Every token uses all layers."],
  "self-speculative": ["Self-speculative", "An exit drafts tokens and the full model checks them together. The text is the full model's."],
  propagate: ["Propagate", "Skipped layers reuse the exit's state: less work than exact exits, approximate."],
  sled: ["SLED", "All layers; the final prediction is corrected by those of earlier layers."],
  dola: ["DoLa", "All layers; the final prediction is contrasted with that of an earlier layer."],
};
const WITH_EXITS = ["exact", "propagate"]; // strategies that thresholds apply to
const FULL_MODEL = "Full model";
const SPECULATIVE = "self-speculative";

const byId = (id) => document.getElementById(id);
const form = byId("form");
const tip = new Tip(byId("tip"));
let model = null;
let running = null; // the AbortController of the generation in progress

async function load() {
  try {
    model = await fetchModel(byId("key").value);
  } catch (error) {
    byId("key-field").hidden = error.status !== 401;
    const isMissing = error.status === 401 && !byId("key").value;
    return say(isMissing ? "This server needs an API key." : error.message);
  }
  say("");
  showModel();
  byId("generate").disabled = false;
}

function showModel() {
  const { num_layers: layers, exits, strategies, has_chat_template: hasChat } = model.ee;
  document.title = `${model.id} · ee_llm`;
  byId("model").textContent = model.id;
  byId("shape").textContent = `${layers} layers, ${exits.length ? `exits after ${exits.join(", ")}` : "no early exits"}`;
  byId("mode").hidden = !hasChat;
  form.elements.mode.value = hasChat ? "chat" : "text";
  byId("strategy").replaceChildren(...strategies.map((name) => makeOption(name, STRATEGIES[name]?.[0] ?? name)));
  byId("draft-exit").replaceChildren(...exits.map((exit) => makeOption(exit, `exit ${exit}`)));
  byId("max-tokens").max = model.max_model_len;
  byId("max-tokens").value = Math.min(96, Math.floor(model.max_model_len / 2));
  byId("policy").textContent = describePolicy();
  update();
}

function makeOption(value, label) {
  const option = document.createElement("option");
  option.value = value;
  option.textContent = label;
  return option;
}

function describePolicy() {
  const { thresholds, measure } = model.ee.policy;
  const parts = Object.entries(thresholds).map(([exit, one]) => `exit ${exit}: ${one ?? "off"}`);
  return parts.length ? `${parts.join(", ")} by ${measure.replace("_", " ")}` : "no exits";
}

/** Show the fields that the choices need, and what they mean. */
function update() {
  const strategy = byId("strategy").value;
  const isOwn = !byId("server-policy").checked;
  byId("strategy-hint").textContent = STRATEGIES[strategy]?.[1] ?? "";
  byId("thresholds").hidden = !WITH_EXITS.includes(strategy) || !model?.ee.exits.length;
  byId("drafts").hidden = strategy !== SPECULATIVE;
  byId("draft-length").disabled = strategy !== SPECULATIVE; // Hidden fields must not be checked.
  byId("threshold-value").textContent = Number(byId("threshold").value).toFixed(2);
  byId("threshold-field").classList.toggle("unused", !isOwn);
  byId("compare").disabled = strategy === "full";
  document.body.classList.toggle("numbers", byId("numbers").checked);
}

/** Return the field `ee` of the request, and the title of its pane. */
function chosen() {
  const strategy = byId("strategy").value;
  const ee = { strategy, return_exits: true };
  let title = STRATEGIES[strategy]?.[0] ?? strategy;
  if (strategy === SPECULATIVE) {
    ee.draft_exit = Number(byId("draft-exit").value);
    ee.draft_length = Number(byId("draft-length").value);
    title += `, exit ${ee.draft_exit} drafts ${ee.draft_length}`;
  } else if (!byId("thresholds").hidden) {
    const threshold = Number(byId("threshold").value);
    const isOwn = !byId("server-policy").checked;
    if (isOwn) ee.thresholds = threshold;
    title += isOwn ? `, threshold ${threshold.toFixed(2)}` : ", server's policy";
  }
  return { ee, title };
}

async function generate() {
  const prompt = byId("prompt").value;
  const isChat = form.elements.mode.value === "chat";
  const { ee, title } = chosen();
  const runs = [{ ee, pane: new Pane(title, model.ee, tip) }];
  if (byId("compare").checked && !byId("compare").disabled) {
    const full = { strategy: "full", return_exits: true };
    runs.push({ ee: full, pane: new Pane(FULL_MODEL, model.ee, tip) });
  }
  const common = {
    model: model.id,
    max_tokens: Number(byId("max-tokens").value),
    temperature: Number(byId("temperature").value),
    seed: Number(byId("seed").value),
    ...(isChat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
  };
  const path = isChat ? "v1/chat/completions" : "v1/completions";
  const panes = runs.map((run) => run.pane);
  byId("help").hidden = false;
  byId("panes").replaceChildren(...panes.map((pane) => pane.element));
  for (const pane of panes) {
    pane.setPrompt(isChat ? `${prompt}\n\n` : prompt);
    pane.setState("waiting");
  }
  say("");
  setRunning(new AbortController());
  const compare = makeComparison(panes);
  try {
    // One after the other: in a common batch, neither would have its own speed.
    for (const { ee, pane } of runs) {
      pane.setState("running");
      for await (const tokens of streamTokens(path, { ...common, ee }, byId("key").value, running.signal)) {
        pane.add(tokens);
        compare(false);
      }
      pane.setState("done");
    }
    compare(true);
  } catch (error) {
    fail(panes, error);
  } finally {
    setRunning(null);
  }
}

function fail(panes, error) {
  const isStop = error.name === "AbortError";
  const current = panes.find((pane) => pane.element.dataset.state === "running");
  for (const pane of panes) {
    if (pane.element.dataset.state !== "done") pane.setState("stopped");
  }
  if (isStop) return say("Stopped.");
  current.fail(error instanceof ServerError ? error.message : `The page has failed: ${error.message}`);
  if (error.status === 401) byId("key-field").hidden = false;
}

/** Return a function that marks where the texts of two panes diverge, and says it at the end. */
function makeComparison([first, second]) {
  let divergence = null;
  return (areComplete) => {
    if (!second) return;
    if (!divergence) {
      const texts = [first, second].map((pane) => pane.tokens.map((token) => token.text));
      divergence = second.tokens.length ? findDivergence(...texts, areComplete) : null;
      if (divergence) {
        first.markDivergence(divergence.left);
        second.markDivergence(divergence.right);
      }
    }
    if (areComplete) say(verdict(first, second, divergence));
  };
}

function verdict(first, second, divergence) {
  const [own, full] = [first, second].map((pane) => pane.speed.tokensPerSecond);
  const speed = own && full ? `${(own / full).toFixed(2)} × the full model's speed. ` : "";
  if (!divergence) return `${speed}Both texts are the same.`;
  const count = divergence.left === 1 ? "1 token" : `${divergence.left} tokens`;
  return `${speed}The texts diverge after ${count}, at the mark ≠.`;
}

function setRunning(controller) {
  running = controller;
  byId("generate").disabled = controller !== null;
  byId("stop").disabled = controller === null;
}

function say(message) {
  byId("verdict").textContent = message;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (model && !running) generate();
});
form.addEventListener("input", (event) => {
  if (event.target.id === "threshold") byId("server-policy").checked = false;
  update();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("key").addEventListener("change", load);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !tip.hide()) running?.abort();
});
load();
