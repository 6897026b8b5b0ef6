// The header: the swarm, its model, what is missing, tokens per second; the theme; the banner of a lost gateway.

import { html, useState } from "../dom.js";
import { advice } from "../data/api.js";
import { browser } from "../data/storage.js";
import { holesOf, modelName, completeness, weakestOf } from "../data/swarm.js";
import { beginning, inert, isNumber, number, seconds } from "../data/text.js";

function Fact({ name, kind = "", children }) {
  return html`<div class="fact"><dt>${name}</dt><dd class=${kind}>${children}</dd></div>`;
}

function Theme() {
  const [theme, setTheme] = useState(document.documentElement.dataset.theme ?? "system");
  const choose = (event) => {
    const chosen = event.currentTarget.value;
    if (chosen === "system") {
      delete document.documentElement.dataset.theme;
      browser.remove("raceme-theme");
    } else {
      document.documentElement.dataset.theme = chosen;
      browser.set("raceme-theme", chosen);
    }
    setTheme(chosen);
    dispatchEvent(new Event("raceme-theme"));
  };
  return html`<label class="theme">
    Theme
    <select value=${theme} onChange=${choose}>
      <option value="system">system</option>
      <option value="light">light</option>
      <option value="dark">dark</option>
    </select>
  </label>`;
}

export function Header({ swarm, model }) {
  const whole = model !== null && holesOf(model).length === 0;
  const weakest = weakestOf(model);
  return html`<header class="top">
    <h1>Raceme</h1>
    <dl class="facts">
      <${Fact} name="swarm">${swarm === null ? "?" : beginning(swarm.swarm)}<//>
      <${Fact} name="model">
        ${model === null ? inert(swarm?.model ?? "?", 64) : modelName(model)}
        ${" "}<span class="muted">${beginning(model?.revision ?? swarm?.revision)}</span>
      <//>
      <${Fact} name="blocks" kind=${swarm === null ? "" : whole ? "good" : "bad"}>${completeness(swarm, model)}<//>
      ${model !== null &&
      html`<${Fact} name="capacity" kind="figure">
        ${number(model.capacity_tokens_per_s, 1)} of ${number(model.bound_tokens_per_s, 1)} tok/s
      <//>`}
      ${weakest && html`<${Fact} name="weakest">${weakest}<//>`}
      ${isNumber(swarm?.recent?.tokens_per_second) &&
      html`<${Fact} name="now" kind="figure">${number(swarm.recent.tokens_per_second, 1)} tok/s<//>`}
    </dl>
    <${Theme} />
  </header>`;
}

const LINK = {
  connecting: "The page asks the gateway for the state of the swarm.",
  lost: "The gateway does not answer. What stands here is from before.",
  key: "This gateway asks for a key.",
};

/** What is wrong with the connection to the gateway, and what to do; nothing while all is well. */
export function Banner({ link, onRetry, onKey }) {
  const wait = link.state === "lost" ? Math.max(0, link.retryAt - performance.now()) / 1000 : 0;
  return html`<section class="banner ${link.state}" hidden=${link.state === "live"} aria-label="Connection">
    <p role="status">${LINK[link.state] ?? ""}</p>
    ${link.state === "lost" &&
    html`<p>
      ${inert(link.error.message, 200)}. ${advice(link.error)} Next attempt in ${seconds(Math.ceil(wait))}.
      ${" "}<button type="button" class="small" onClick=${onRetry}>Try now</button>
    </p>`}
    ${link.state === "key" &&
    html`<p><button type="button" class="small" onClick=${onKey}>Enter a key</button></p>`}
  </section>`;
}
