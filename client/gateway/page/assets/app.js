// The page of a gateway: its events make the state, the state makes the page.

import { html, render, useEffect, useMemo, useReducer, useState } from "./dom.js";
import { read } from "./data/api.js";
import { Conversation } from "./data/conversation.js";
import { Feed } from "./data/feed.js";
import { EMPTY, folded, Store, withoutEnded, withSessions } from "./data/store.js";
import { completeness, holesOf, modelName, modelOf, namesOf } from "./data/swarm.js";
import { inert } from "./data/text.js";
import { BlockMap } from "./views/blocks.js";
import { Chat } from "./views/chat.js";
import { Banner, Header } from "./views/header.js";
import { Plots } from "./views/plots.js";
import { Servers } from "./views/servers.js";
import { Log, Sessions } from "./views/sessions.js";
import { KeyDialog } from "./views/settings.js";

const TICK_MS = 1000;
const LIST_SOON_MS = 200; // several sessions often begin at once
const LIST_MS = 5000; // while sessions run, their numbers are brought up to date as often
const QUIET_MS = 3000; // the past that a page reads at first is not said aloud

const store = new Store(EMPTY);
const conversation = new Conversation();
const feed = new Feed({
  onEvent: (name, data) => store.update((state) => folded(state, name, data, performance.now())),
  onLink: (link) => store.update((state) => ({ ...state, link })),
});

let asking = false;

/** Ask for the list of sessions; where that fails, the feed says why. */
async function listSessions() {
  if (asking) return;
  asking = true;
  try {
    const { sessions } = await read("api/sessions");
    store.update((state) => withSessions(state, sessions, performance.now()));
  } catch {
    // The next attempt, or the banner.
  } finally {
    asking = false;
  }
}

async function listModels() {
  try {
    const { data } = await read("v1/models");
    return Array.isArray(data) ? data.map((model) => model?.id).filter((id) => typeof id === "string") : [];
  } catch {
    return [];
  }
}

function useStore() {
  const [, redraw] = useReducer((count) => count + 1, 0);
  useEffect(() => store.listen(redraw), []);
  useEffect(() => {
    const timer = setInterval(() => {
      store.update((state) => withoutEnded(state, performance.now()));
      redraw();
    }, TICK_MS);
    return () => clearInterval(timer);
  }, []);
  return store.value;
}

/** Keeps the list of sessions and the list of models fresh. */
function useLists(state) {
  const [models, setModels] = useState([]);
  const live = state.link.state === "live";
  const busy = state.sessions.some((session) => session.state !== "ended");
  useEffect(() => {
    if (!live) return undefined;
    const timer = setTimeout(listSessions, LIST_SOON_MS);
    return () => clearTimeout(timer);
  }, [live, state.unknownSession]);
  useEffect(() => {
    if (!live || !busy) return undefined;
    const timer = setInterval(listSessions, LIST_MS);
    return () => clearInterval(timer);
  }, [live, busy]);
  useEffect(() => {
    if (live) void listModels().then((found) => found.length && setModels(found));
  }, [live]);
  return models;
}

function useQuiet(live) {
  const [quiet, setQuiet] = useState(true);
  useEffect(() => {
    setQuiet(true);
    if (!live) return undefined;
    const timer = setTimeout(() => setQuiet(false), QUIET_MS);
    return () => clearTimeout(timer);
  }, [live]);
  return quiet;
}

/** Whether the model can answer, and what a chat without a message says of that. */
function readiness(swarm, model) {
  if (swarm === null) return { yes: true, words: "The page waits for the gateway." };
  if (model === null || holesOf(model).length) {
    return { yes: false, words: "The model is not complete: an answer waits for the missing blocks." };
  }
  const words = `Ask ${modelName(model)} something. Each token goes through the servers of a route; the servers can read the text.`;
  return { yes: true, words };
}

function Page() {
  const state = useStore();
  const { swarm, link, sessions } = state;
  const models = useLists(state);
  const quiet = useQuiet(link.state === "live");
  const [asksKey, setAsksKey] = useState(false);
  const [triedKey, setTriedKey] = useState(false);
  const model = useMemo(() => (swarm === null ? null : modelOf(swarm)), [swarm]);
  const nameOf = useMemo(() => namesOf(swarm), [swarm]);
  const since = (performance.now() - state.swarmSince) / 1000;
  useEffect(() => {
    const name = model === null ? inert(swarm?.model ?? "") : modelName(model);
    document.title = ["Raceme", name, swarm === null ? "" : completeness(swarm, model)].filter(Boolean).join(" · ");
  }, [swarm, model]);
  useEffect(() => {
    if (link.state === "key") setAsksKey(true);
    if (link.state === "live") setTriedKey(false);
  }, [link]);
  const keyDone = (changed) => {
    setAsksKey(false);
    if (!changed) return;
    setTriedKey(true);
    feed.retryNow();
  };
  const mine = new Set(conversation.turns.flatMap((turn) => [turn.requestId, turn.chunkId]).filter(Boolean));
  const askKey = () => setAsksKey(true);
  return html`<a class="skip" href="#prompt">Skip to the chat</a>
    <${Header} swarm=${swarm} model=${model} />
    <${Banner} link=${link} onRetry=${() => feed.retryNow()} onKey=${askKey} />
    <main class=${link.state === "lost" ? "stale" : ""}>
      <div class="column">
        <${BlockMap} swarm=${swarm} model=${model} since=${since} />
        <${Servers} swarm=${swarm} since=${since} />
        <${Sessions} sessions=${sessions} nameOf=${nameOf} mine=${mine} />
        <${Plots} traffic=${state.traffic} />
      </div>
      <div class="column">
        <${Chat}
          conversation=${conversation}
          sessions=${sessions}
          nameOf=${nameOf}
          models=${models}
          complete=${readiness(swarm, model)}
          onKey=${askKey}
        />
        <${Log} log=${state.log} quiet=${quiet} />
      </div>
    </main>
    <${KeyDialog} open=${asksKey} refused=${triedKey && link.state === "key"} onDone=${keyDone} />`;
}

const root = document.getElementById("page");
root.replaceChildren();
render(html`<${Page} />`, root);
feed.start();
