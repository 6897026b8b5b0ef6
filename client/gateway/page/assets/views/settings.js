// The settings of the chat, and the dialog that asks for a key.

import { html, useEffect, useRef, useState } from "../dom.js";
import { apiKey, setApiKey } from "../data/api.js";
import { NUMBERS, numberIn } from "../data/completion.js";
import { inert } from "../data/text.js";

function NumberField({ name, settings, onChange }) {
  const { label, min, max, step, empty } = NUMBERS[name];
  const [text, setText] = useState(settings[name] === null ? "" : String(settings[name]));
  const value = numberIn(name, text);
  const wrong = value === undefined;
  const change = (event) => {
    const typed = event.currentTarget.value;
    setText(typed);
    const next = numberIn(name, typed);
    if (next !== undefined) onChange({ ...settings, [name]: next });
  };
  const hint = `${name}-hint`;
  const bounds = name === "seed" ? "a whole number, or nothing" : `${min} to ${max}`;
  return html`<label class="field">
    ${label}
    <input
      type="number"
      inputmode="decimal"
      min=${min}
      max=${max}
      step=${step}
      placeholder=${empty ? "random" : ""}
      value=${text}
      aria-invalid=${wrong}
      aria-describedby=${hint}
      onInput=${change}
    />
    <span id=${hint} class=${wrong ? "bad" : "visually-hidden"}>${bounds}</span>
  </label>`;
}

export function Settings({ settings, models, onChange, onKey }) {
  return html`<details class="settings">
    <summary>Settings</summary>
    <div class="fields">
      ${models.length > 1 &&
      html`<label class="field">
        Model
        <select
          value=${settings.model}
          onChange=${(event) => onChange({ ...settings, model: event.currentTarget.value })}
        >
          ${models.map((model) => html`<option key=${model} value=${model}>${inert(model, 64)}</option>`)}
        </select>
      </label>`}
      ${Object.keys(NUMBERS).map(
        (name) => html`<${NumberField} key=${name} name=${name} settings=${settings} onChange=${onChange} />`,
      )}
      <label class="field wide">
        System message
        <textarea
          rows="2"
          value=${settings.system}
          onInput=${(event) => onChange({ ...settings, system: event.currentTarget.value })}
        ></textarea>
      </label>
      <div class="field">
        <button type="button" onClick=${onKey}>${apiKey() ? "Change the key" : "Enter a key"}</button>
      </div>
    </div>
  </details>`;
}

/** Asks for a key.  refused: the gateway did not take the last one.  onDone(changed). */
export function KeyDialog({ open, refused, onDone }) {
  const dialog = useRef(null);
  const [text, setText] = useState("");
  useEffect(() => {
    const element = dialog.current;
    if (open && !element.open) {
      setText("");
      element.showModal();
    } else if (!open && element.open) element.close();
  }, [open]);
  const use = (event) => {
    event.preventDefault();
    setApiKey(text.trim());
    onDone(true);
  };
  const forget = () => {
    setApiKey("");
    onDone(true);
  };
  return html`<dialog ref=${dialog} aria-labelledby="key-title" onClose=${() => open && onDone(false)}>
    <form onSubmit=${use}>
      <h2 id="key-title">Key of the gateway</h2>
      ${refused && html`<p class="bad" role="alert">The gateway refused this key.</p>`}
      <p>The gateway's operator gives keys. This tab keeps yours until you close it, and sends it to this gateway alone.</p>
      <label class="field wide">
        Key
        <input
          type="password"
          autocomplete="off"
          spellcheck=${false}
          value=${text}
          onInput=${(event) => setText(event.currentTarget.value)}
        />
      </label>
      <div class="buttons">
        <button type="submit" class="primary" disabled=${text.trim() === ""}>Use the key</button>
        ${apiKey() && html`<button type="button" onClick=${forget}>Forget the key</button>`}
        <button type="button" onClick=${() => onDone(false)}>Cancel</button>
      </div>
    </form>
  </dialog>`;
}
