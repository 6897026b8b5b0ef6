// The state of the page: a fold over the gateway's events.  Pure; `Store` holds the latest value and its listeners.

import { isNumber } from "./text.js";
import { isTrouble, peersOfHops, peerLine, sessionLine } from "./trace.js";
import { namesOf } from "./swarm.js";

export const LOG_LINES = 200;
export const PLOT_SECONDS = 600;
const ENDED_MS = 6000; // an ended session stays in sight as long

export const EMPTY = {
  link: { state: "connecting" },
  swarm: null,
  swarmSince: 0, // performance.now() of the latest description
  sessions: [],
  unknownSession: 0, // counts events of sessions that are not listed yet: a reason to ask for the list
  log: [],
  lines: 0, // ever made; the key of the next line
  traffic: [],
};

/** The state after an event of /api/events.  now: performance.now(). */
export function folded(state, name, data, now) {
  if (name === "swarm") return { ...state, swarm: data, swarmSince: now };
  if (name === "traffic") return { ...state, traffic: withTraffic(state.traffic, data) };
  if (typeof data.what !== "string") return state;
  const nameOf = namesOf(state.swarm);
  if (name === "peer") return withLine(state, data, peerLine(data, nameOf));
  if (name === "session") return withLine(withSession(state, data, now), data, sessionLine(data, nameOf));
  return state;
}

function withTraffic(traffic, data) {
  if (!isNumber(data.at)) return traffic;
  const before = traffic.filter((each) => each.at > data.at - PLOT_SECONDS && each.at < data.at);
  return [...before, data];
}

function withLine(state, event, text) {
  if (text === null) return state;
  const line = { key: state.lines, at: event.at, text, trouble: isTrouble(event) };
  return { ...state, lines: state.lines + 1, log: [...state.log, line].slice(-LOG_LINES) };
}

/** The list of sessions from /api/sessions; those that ended a moment ago stay in sight. */
export function withSessions(state, list, now) {
  const sessions = (Array.isArray(list) ? list : []).filter((each) => each !== null && typeof each === "object");
  const ids = new Set(sessions.map((each) => each.id));
  const ended = state.sessions
    .filter((each) => !ids.has(each.id))
    .map((each) => (each.state === "ended" ? each : { ...each, state: "ended", endedAt: now }));
  const stamped = sessions.map((each) => (each.state === "ended" ? { endedAt: now, ...each } : each));
  return withoutEnded({ ...state, sessions: [...stamped, ...ended] }, now);
}

/** Without the sessions that ended a while ago. */
export function withoutEnded(state, now) {
  const sessions = state.sessions.filter(
    (each) => each.state !== "ended" || now - (each.endedAt ?? now) < ENDED_MS,
  );
  return sessions.length === state.sessions.length ? state : { ...state, sessions };
}

function withSession(state, event, now) {
  const known = state.sessions.find((each) => each.id === event.id);
  if (known === undefined) {
    return event.what === "ended" ? state : { ...state, unknownSession: state.unknownSession + 1 };
  }
  const changed = { ...known, ...changeOf(known, event, now) };
  return { ...state, sessions: state.sessions.map((each) => (each === known ? changed : each)) };
}

function hopsFrom(ids, known) {
  const before = new Map(known.hops?.map((hop) => [hop.peer, hop]) ?? []);
  return peersOfHops(ids).map((peer) => before.get(peer) ?? { peer });
}

function changeOf(known, event, now) {
  switch (event.what) {
    case "queued":
      return { state: "queued" };
    case "opened":
      return { state: "prefill", hops: hopsFrom(event.hops, known) };
    case "steps":
      return {
        state: "decode",
        tokens: (known.tokens ?? 0) + (isNumber(event.tokens) ? event.tokens : 0),
        tokens_per_second: event.seconds > 0 ? event.tokens / event.seconds : known.tokens_per_second,
        hops: Array.isArray(event.hops) && event.hops.length ? hopsFrom(event.hops, known) : known.hops,
      };
    case "fault":
      return { state: "recovering" };
    case "rerouted":
      return {
        recoveries: (known.recoveries ?? 0) + 1,
        hops: Array.isArray(event.hops) && event.hops.length ? hopsFrom(event.hops, known) : known.hops,
      };
    case "recovered":
      return { state: "decode" };
    case "ended":
      return { state: "ended", endedAt: now };
    default:
      return {};
  }
}

/** A value and its listeners, called once per frame however often the value changes. */
export class Store {
  #listeners = new Set();
  #due = false;

  constructor(value) {
    this.value = value;
  }

  set(value) {
    if (value === this.value) return;
    this.value = value;
    if (this.#due) return;
    this.#due = true;
    const tell = () => {
      this.#due = false;
      for (const listener of this.#listeners) listener();
    };
    // A page in the background has no frames.
    if (document.visibilityState === "visible") requestAnimationFrame(tell);
    else setTimeout(tell, 200);
  }

  update(change) {
    this.set(change(this.value));
  }

  listen(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }
}
