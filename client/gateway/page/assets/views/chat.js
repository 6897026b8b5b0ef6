// The chat: the conversation, the message that a person writes, stop, copies, settings.

import { html, useEffect, useLayoutEffect, useReducer, useRef, useState } from "../dom.js";
import { curlOf, keepSettings, loadSettings } from "../data/completion.js";
import { asText } from "../data/conversation.js";
import { Answer, Question } from "./answer.js";
import { CopyButton, Panel, Said } from "./parts.js";
import { Settings } from "./settings.js";

const NEAR_END = 60; // pixels: closer to the end, the view follows the text

const ENDED = {
  done: (answer) => `The answer is complete. ${answer.text}`,
  stopped: () => "Stopped.",
  failed: () => "",
};

/** What a screen reader says: that an answer begins, and the whole answer when it is there. */
function spoken(answer) {
  if (answer === null) return "";
  return ENDED[answer.state]?.(answer) ?? "The answer begins.";
}

/** The session of an answer among the gateway's. */
function sessionOf(answer, sessions) {
  return sessions.find((each) => each.id === answer.requestId || each.id === answer.chunkId);
}

function useConversation(conversation) {
  const [, redraw] = useReducer((count) => count + 1, 0);
  useEffect(() => {
    let frame = 0;
    const due = () => {
      if (!frame) frame = setTimeout(() => ((frame = 0), redraw()), 30);
    };
    const stop = conversation.listen(due);
    return () => (clearTimeout(frame), stop());
  }, [conversation]);
}

/** Esc stops the answer, wherever the focus is; a dialog has Esc for itself. */
function useEscape(conversation) {
  useEffect(() => {
    const stop = (event) => {
      if (event.key === "Escape" && conversation.busy && !document.querySelector("dialog[open]")) {
        event.preventDefault();
        conversation.stop();
      }
    };
    addEventListener("keydown", stop);
    return () => removeEventListener("keydown", stop);
  }, [conversation]);
}

function Legend() {
  return html`<p class="legend muted">
    Colour: step time against the usual one:${" "}
    <span class="grade-0">usual</span> <span class="grade-1">1.5×</span> <span class="grade-2">2.5×</span>${" "}
    <span class="grade-3">5×</span>; ⟲ the route changed. Point at a token, or choose it with Tab and arrows, for its hops.
  </p>`;
}

function Composer({ conversation, settings, input }) {
  const [text, setText] = useState("");
  const send = (event) => {
    event?.preventDefault();
    if (conversation.busy || text.trim() === "") return;
    conversation.send(text, settings);
    setText("");
  };
  const keys = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  };
  const { busy } = conversation;
  return html`<form class="composer" onSubmit=${send}>
    <label class="visually-hidden" for="prompt">Message</label>
    <textarea
      id="prompt"
      ref=${input}
      rows="2"
      placeholder="Message (Enter sends, Shift+Enter begins a line)"
      value=${text}
      onInput=${(event) => setText(event.currentTarget.value)}
      onKeyDown=${keys}
    ></textarea>
    ${busy
      ? html`<button key="stop" type="button" class="stop" aria-keyshortcuts="Escape" onClick=${() => conversation.stop()}>
          Stop
        </button>`
      : html`<button key="send" type="submit" class="primary" disabled=${text.trim() === ""}>Send</button>`}
  </form>`;
}

function useFollow(conversation) {
  const view = useRef(null);
  const follows = useRef(true);
  useLayoutEffect(() => {
    if (follows.current) view.current.scrollTop = view.current.scrollHeight;
  });
  const scrolled = () => {
    const { scrollHeight, scrollTop, clientHeight } = view.current;
    follows.current = scrollHeight - scrollTop - clientHeight < NEAR_END;
  };
  useEffect(() => {
    follows.current = true;
  }, [conversation.turns.length]);
  return [view, scrolled];
}

export function Chat({ conversation, sessions, nameOf, models, complete, onKey }) {
  useConversation(conversation);
  useEscape(conversation);
  const [settings, setSettings] = useState(loadSettings);
  const input = useRef(null);
  const [view, scrolled] = useFollow(conversation);
  const change = (next) => {
    setSettings(next);
    keepSettings(next);
  };
  // A model that the gateway no longer has is not asked for; "" means the gateway's own.
  const known = models.length === 0 || models.includes(settings.model);
  const asked = known ? settings : { ...settings, model: models[0] };
  const { turns, answer } = conversation;
  const clear = () => {
    conversation.clear();
    input.current?.focus();
  };
  const aside = html`<div class="buttons">
    <${CopyButton} text=${() => asText(turns, settings.system)} label="Copy all" name="Copy the conversation" />
    <${CopyButton} text=${() => curlOf(questions(turns), asked)} label="curl" name="Copy as a curl command" />
    <button type="button" class="small" onClick=${clear}>New chat</button>
  </div>`;
  return html`<${Panel} id="chat" title="Chat" aside=${aside}>
    <div class="turns" ref=${view} onScroll=${scrolled} tabindex="0" role="group" aria-label="conversation">
      ${turns.length === 0 && html`<p class="muted">${complete.words}</p>`}
      ${turns.map((turn, index) =>
        turn.role === "user"
          ? html`<${Question} key=${turn.id} turn=${turn} />`
          : html`<${Answer}
              key=${turn.id}
              answer=${turn}
              session=${sessionOf(turn, sessions)}
              nameOf=${nameOf}
              complete=${complete.yes}
              latest=${index === turns.length - 1}
              busy=${conversation.busy}
              onRetry=${() => conversation.retry(asked)}
              onKey=${onKey}
            />`,
      )}
    </div>
    <div role="status"><${Said}>${spoken(answer)}<//></div>
    <${Composer} conversation=${conversation} settings=${asked} input=${input} />
    <${Legend} />
    <${Settings} settings=${asked} models=${models} onChange=${change} onKey=${onKey} />
  <//>`;
}

/** The turns up to the last question: what a curl command asks again. */
function questions(turns) {
  const last = turns.findLastIndex((turn) => turn.role === "user");
  return last < 0 ? [{ role: "user", text: "Hello" }] : turns.slice(0, last + 1);
}
