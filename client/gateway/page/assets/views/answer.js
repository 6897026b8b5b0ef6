// One turn of the chat.  An answer is made of tokens: each has the colour of its step time and shows its hops.

import { html, useEffect, useLayoutEffect, useRef, useState } from "../dom.js";
import { advice, mayRetry } from "../data/api.js";
import { inert, milliseconds, number, shortId } from "../data/text.js";
import { changeInWords, changesRoute, hopsInWords } from "../data/trace.js";
import { CopyButton } from "./parts.js";

const SHOWN = 24; // characters of a token's text in its description

function tokenInWords(answer, index, nameOf) {
  const token = answer.tokens[index];
  const text = inert(token.text.trim(), SHOWN);
  const hops = hopsInWords(token.hops, nameOf) || (token.gap === null ? "" : `after ${milliseconds(token.gap)}`);
  return `token ${index + 1}${text ? ` “${text}”` : ""}: ${hops || "the prompt"}`;
}

function spanOf(token, index) {
  const span = document.createElement("span");
  span.className = `token grade-${token.grade}${token.thinks ? " thought" : ""}`;
  span.dataset.index = String(index);
  span.tabIndex = -1;
  span.textContent = token.text;
  return span;
}

/** A mark before the first token after a change of the route. */
function markOf(token, index, nameOf) {
  const mark = document.createElement("span");
  mark.className = "mark";
  mark.dataset.index = String(index);
  mark.setAttribute("role", "img");
  mark.setAttribute("aria-label", `route changed: ${changeInWords(token.events, nameOf, token.gap)}`);
  mark.textContent = "⟲";
  return mark;
}

/** The tokens' elements are only ever added: a long answer costs a token as much as a short one. */
function Tokens({ answer, nameOf, chosen, onChoose }) {
  const holder = useRef(null);
  const drawn = useRef(0);
  const names = useRef(nameOf);
  names.current = nameOf;
  useLayoutEffect(() => {
    const { tokens } = answer;
    const added = document.createDocumentFragment();
    for (; drawn.current < tokens.length; drawn.current += 1) {
      const token = tokens[drawn.current];
      if (changesRoute(token.events)) added.append(markOf(token, drawn.current, names.current));
      added.append(spanOf(token, drawn.current));
    }
    holder.current.append(added);
  });
  useLayoutEffect(() => {
    const spans = holder.current.querySelectorAll(".token");
    for (const span of holder.current.querySelectorAll(".chosen, [tabindex='0']")) {
      span.classList.remove("chosen");
      span.tabIndex = -1;
    }
    // One stop of the Tab key for the whole answer; arrows go from token to token.
    const stop = spans[chosen ?? 0];
    if (stop !== undefined) stop.tabIndex = 0;
    if (chosen !== null) stop?.classList.add("chosen");
  }, [chosen, answer.tokens.length > 0]);
  const indexOf = (event) => {
    const index = event.target.closest?.("[data-index]")?.dataset.index;
    return index === undefined ? null : Number(index);
  };
  const choose = (event) => {
    const index = indexOf(event);
    if (index !== null) onChoose(index);
  };
  const move = (event) => {
    const index = indexOf(event);
    const last = answer.tokens.length - 1;
    const next = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: last }[event.key];
    if (index === null || next === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    holder.current.querySelectorAll(".token")[Math.min(Math.max(next, 0), last)]?.focus();
  };
  return html`<div
    ref=${holder}
    class="text"
    dir="auto"
    role="group"
    aria-label="the answer's tokens; arrow keys go from one to the next"
    onMouseOver=${choose}
    onClick=${choose}
    onfocusin=${choose}
    onKeyDown=${move}
  ></div>`;
}

/** What is known of one token: the hops, and how the route changed before it. */
function Detail({ answer, index, nameOf }) {
  const token = answer.tokens[index];
  const change = changesRoute(token.events) ? changeInWords(token.events, nameOf, token.gap) : "";
  return html`<output class="detail">
    ${tokenInWords(answer, index, nameOf)}
    ${change && html`<br />⟲ ${change}`}
  </output>`;
}

/** Sentences on the changes of the route in an answer, below the text. */
function Changes({ answer, nameOf }) {
  const changed = answer.tokens
    .map((token, index) => ({ token, index }))
    .filter(({ token }) => changesRoute(token.events));
  if (!changed.length) return null;
  return html`<ul class="changes" aria-label="changes of the route">
    ${changed.map(
      ({ token, index }) =>
        html`<li key=${index}>
          <span aria-hidden="true">⟲ </span>token ${index + 1}: ${changeInWords(token.events, nameOf, token.gap)}
        </li>`,
    )}
  </ul>`;
}

function figuresOf(answer) {
  const parts = [`${answer.count} ${answer.count === 1 ? "token" : "tokens"}`];
  if (answer.perSecond !== null) parts.push(`${number(answer.perSecond, 1)} tok/s`);
  if (answer.firstMs !== null) parts.push(`first ${milliseconds(answer.firstMs)}`);
  if (answer.state === "stopped") parts.push("stopped");
  if (answer.reason === "length") parts.push("cut: no tokens left");
  return parts.join(" · ");
}

function Waiting({ session, complete }) {
  const words = {
    queued: "The request waits in the gateway's queue.",
    prefill: "The servers read the prompt.",
    recovering: "A server is gone; another one takes over.",
  };
  const usual = complete ? "Waiting for the first token." : "Waiting for servers of the missing blocks.";
  return html`<p class="muted">${(complete && words[session?.state]) || usual}</p>`;
}

function Failure({ answer, onRetry, onKey, busy }) {
  const { error } = answer;
  const retry = mayRetry(error) || error.status === 401;
  const [left, setLeft] = useState(error.retryAfter === null ? 0 : Math.ceil(error.retryAfter));
  useEffect(() => {
    if (left <= 0) return undefined;
    const timer = setTimeout(() => setLeft(left - 1), 1000);
    return () => clearTimeout(timer);
  }, [left]);
  return html`<div class="failure" role="alert">
    <p><strong>${inert(error.message, 400)}</strong></p>
    <p>${advice(error)}</p>
    <p>
      ${error.status === 401 && html`<button type="button" class="small" onClick=${onKey}>Enter a key</button> `}
      ${retry &&
      html`<button type="button" class="small" disabled=${busy || left > 0} onClick=${onRetry}>
        Try again${left > 0 ? ` in ${left} s` : ""}
      </button>`}
      ${error.requestId && html` <span class="muted">request ${error.requestId}</span>`}
    </p>
  </div>`;
}

export function Answer({ answer, session, nameOf, complete, latest, busy, onRetry, onKey }) {
  const [chosen, setChosen] = useState(null);
  const shown = chosen !== null && chosen < answer.tokens.length;
  const waits = answer.state === "waiting" || (answer.state === "streaming" && session?.state === "recovering");
  return html`<article class="turn answer" aria-label="answer" aria-busy=${waits || answer.state === "streaming"}>
    <${Tokens} answer=${answer} nameOf=${nameOf} chosen=${chosen} onChoose=${setChosen} />
    ${waits && html`<${Waiting} session=${session} complete=${complete} />`}
    ${shown && html`<${Detail} answer=${answer} index=${chosen} nameOf=${nameOf} />`}
    <${Changes} answer=${answer} nameOf=${nameOf} />
    ${answer.error && latest && html`<${Failure} answer=${answer} onRetry=${onRetry} onKey=${onKey} busy=${busy} />`}
    ${answer.error && !latest && html`<p class="bad">${inert(answer.error.message, 400)}</p>`}
    ${answer.tokens.length > 0 &&
    html`<div class="figures">
      <span>${figuresOf(answer)}</span>
      ${answer.requestId && html`<span class="muted">request ${shortId(answer.requestId)}</span>`}
      <${CopyButton} text=${() => answer.text} name="Copy the answer" />
    </div>`}
  </article>`;
}

export function Question({ turn }) {
  return html`<article class="turn question" aria-label="your message">
    <div class="text" dir="auto">${turn.text}</div>
    <${CopyButton} text=${() => turn.text} name="Copy your message" />
  </article>`;
}
