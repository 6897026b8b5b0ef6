// Small parts that several views share: a panel, a button that copies, a command to paste.

import { html, useEffect, useRef, useState } from "../dom.js";

const SAID_MS = 1500;

/** A region of the page with a heading. */
export function Panel({ id, title, aside = null, children }) {
  return html`<section class="panel" id=${id} aria-labelledby="${id}-title" tabindex="-1">
    <div class="panel-head">
      <h2 id="${id}-title">${title}</h2>
      ${aside}
    </div>
    ${children}
  </section>`;
}

/** Whether the text is on the clipboard now.  Without https only the old way is allowed. */
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = document.createElement("textarea");
    field.value = text;
    field.className = "visually-hidden";
    const focused = document.activeElement;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    focused?.focus();
    return done;
  }
}

/** A button that copies `text()`, and says so. */
export function CopyButton({ text, label = "Copy", name = label }) {
  const [said, setSaid] = useState("");
  const timer = useRef(0);
  useEffect(() => () => clearTimeout(timer.current), []);
  const copy = async () => {
    setSaid((await copied(text())) ? "Copied" : "Not allowed");
    clearTimeout(timer.current);
    timer.current = setTimeout(() => setSaid(""), SAID_MS);
  };
  return html`<button type="button" class="small" aria-label=${said ? `${said}: ${name}` : name} onClick=${copy}>
    <span aria-live="polite">${said || label}</span>
  </button>`;
}

/** A command for a shell, with a button that copies it. */
export function Command({ text }) {
  return html`<div class="command">
    <code>${text}</code>
    <${CopyButton} text=${() => text} name="Copy the command" />
  </div>`;
}

/** A text for screen readers alone. */
export function Said({ children }) {
  return html`<span class="visually-hidden">${children}</span>`;
}
