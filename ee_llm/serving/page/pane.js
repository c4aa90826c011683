// One generation on the page: its tokens coloured by exit, its histogram of depths, its speed.

import { Speedometer } from "./comparison.js";

const NUM_SLOTS = 8; // four colours, each with two patterns, as in style.css

export class Pane {
  /** Show a generation; model: the field `ee` of the model. */
  constructor(title, model, tip) {
    this.tokens = [];
    this.speed = new Speedometer();
    this.summary = null;
    this.layers = model.num_layers;
    this.depths = [...model.exits, model.num_layers];
    this.counts = new Map(this.depths.map((depth) => [depth, 0]));
    this.tip = tip;
    const template = document.getElementById("pane-template");
    this.element = template.content.firstElementChild.cloneNode(true);
    this.find(".pane-title").textContent = title;
    this.text = this.find(".text");
    this.text.setAttribute("aria-label", `Text of ${title}. Arrow keys move between tokens.`);
    this.end = this.find(".end");
    this.rows = new Map(this.depths.map((depth) => [depth, this.makeRow(depth)]));
    this.spans = [];
    this.listen();
    this.showFigures();
  }

  find(selector) {
    return this.element.querySelector(selector);
  }

  setPrompt(prompt) {
    this.find(".prompt").textContent = prompt;
  }

  setState(state) {
    this.find(".state").textContent = state;
    this.element.dataset.state = state;
    this.text.setAttribute("aria-busy", String(state === "running"));
  }

  fail(message) {
    const place = this.find(".error");
    place.textContent = message;
    place.hidden = false;
    this.setState("failed");
  }

  /** Add tokens that arrived together. */
  add(tokens) {
    this.speed.add(tokens.length, performance.now());
    const added = document.createDocumentFragment();
    for (const token of tokens) {
      this.counts.set(token.exit, (this.counts.get(token.exit) ?? 0) + 1);
      this.summary = token.summary ?? this.summary;
      this.tokens.push(token);
      added.append(this.makeSpan(token));
      this.find(".strip").append(this.makeColumn(token));
    }
    const { scrollTop, clientHeight, scrollHeight } = this.text;
    const isAtEnd = scrollTop + clientHeight >= scrollHeight - 8;
    this.end.before(added);
    if (isAtEnd) this.text.scrollTop = this.text.scrollHeight;
    this.showFigures();
  }

  get meanDepth() {
    const sum = this.tokens.reduce((total, token) => total + token.exit, 0);
    return sum / Math.max(1, this.tokens.length);
  }

  /** Mark the token at which this text diverges from the other one. */
  markDivergence(index) {
    const mark = document.createElement("span");
    mark.className = "divergence";
    mark.textContent = "≠";
    mark.setAttribute("role", "img");
    mark.setAttribute("aria-label", "The texts diverge here.");
    (this.spans[index] ?? this.end).before(mark);
  }

  makeSpan(token) {
    const span = document.createElement("span");
    span.className = "token";
    style(span, token.exit, this.depths);
    span.textContent = token.text;
    // One token is in the order of the Tab key; arrow keys reach the others.
    span.tabIndex = this.spans.length ? -1 : 0;
    span.dataset.index = this.spans.length;
    span.hidden = token.text === "";
    this.spans.push(span);
    return span;
  }

  makeColumn(token) {
    const column = document.createElement("span");
    style(column, token.exit, this.depths);
    column.style.setProperty("--share", token.exit / this.layers);
    return column;
  }

  makeRow(depth) {
    const row = document.createElement("li");
    const [name, bar, count] = ["name", "bar", "count"].map((kind) => {
      const part = document.createElement("span");
      part.className = kind;
      return part;
    });
    name.textContent = this.nameOf(depth);
    style(name, depth, this.depths);
    style(bar, depth, this.depths);
    row.append(name, bar, count);
    this.find(".depths").append(row);
    return { bar, count };
  }

  nameOf(depth) {
    return depth === this.layers ? "final exit" : `exit ${depth}`;
  }

  showFigures() {
    const total = this.tokens.length;
    for (const [depth, { bar, count }] of this.rows) {
      const share = this.counts.get(depth) / Math.max(1, total);
      bar.style.setProperty("--share", share);
      count.textContent = `${this.counts.get(depth)} (${Math.round(100 * share)} %)`;
    }
    const speed = this.speed.tokensPerSecond;
    this.find(".speed").textContent = speed === null ? "–" : speed.toFixed(1);
    this.find(".mean").textContent = total ? this.meanDepth.toFixed(2) : "–";
    this.find(".layers").textContent = this.layers;
    this.find(".total").textContent = total === 1 ? "1 token" : `${total} tokens`;
  }

  listen() {
    const show = (event) => {
      const span = event.target.closest(".token");
      if (span) this.showTip(span);
    };
    this.text.addEventListener("pointerover", show);
    this.text.addEventListener("focusin", show);
    this.text.addEventListener("focusout", () => this.tip.hide());
    this.text.addEventListener("pointerleave", () => {
      this.tip.hide();
      const focused = document.activeElement;
      if (this.text.contains(focused)) this.showTip(focused);
    });
    this.text.addEventListener("keydown", (event) => this.move(event));
  }

  /** Move the focus between tokens. */
  move(event) {
    const shown = this.spans.filter((span) => !span.hidden);
    const at = shown.indexOf(event.target.closest(".token"));
    const targets = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: shown.length - 1 };
    const next = shown[targets[event.key]];
    if (at < 0 || !next) return;
    event.preventDefault();
    shown[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  showTip(span) {
    const index = Number(span.dataset.index);
    const { text, exit, confidence } = this.tokens[index];
    const title = `${JSON.stringify(text)}: ${this.nameOf(exit)}`;
    const details =
      `${exit} of ${this.layers} layers · confidence ${confidence.toFixed(3)} · token ${index + 1}`;
    this.tip.show(span, title, details, (element) => style(element, exit, this.depths));
  }
}

/** Give an element the colour and the pattern of a depth. */
function style(element, depth, depths) {
  const index = depths.indexOf(depth);
  const isFinal = index < 0 || index === depths.length - 1;
  element.dataset.slot = isFinal ? "final" : index % NUM_SLOTS;
  element.dataset.exit = depth;
}
