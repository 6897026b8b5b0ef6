// Events of a session in words: for the log, and for the marks in an answer.

import { count, inert, isNumber, milliseconds, shortId, span } from "./text.js";

const list = (value) => (Array.isArray(value) ? value : []);

/** [[peer, held_ms, computed_ms]...] as "demo-1 17 ms → spare 24 ms". */
export function hopsInWords(hops, nameOf) {
  return list(hops)
    .map(([peer, held]) => `${nameOf(peer)} ${milliseconds(held)}`)
    .join(" → ");
}

/** The peers of a chain: ids, [peer, ...] or {peer}. */
export function peersOfHops(hops) {
  return list(hops).map((hop) => (Array.isArray(hop) ? hop[0] : typeof hop === "object" ? hop?.peer : hop));
}

export function chainInWords(hops, nameOf) {
  return peersOfHops(hops).map(nameOf).join(" → ");
}

/** The sum of the times in the hops' hands, in ms; null where none is known. */
export function stepMilliseconds(hops) {
  const held = list(hops).map((hop) => hop[1]).filter(isNumber);
  return held.length ? held.reduce((sum, each) => sum + each, 0) : null;
}

function positionsOf(event) {
  if (isNumber(event.positions)) return event.positions;
  return isNumber(event.stop) && isNumber(event.start) ? event.stop - event.start : 0;
}

/** Whether these events changed the route: a token with such events gets a mark. */
export function changesRoute(events) {
  return list(events).some((event) => ["fault", "rerouted", "replayed", "recovered", "relayed"].includes(event.kind));
}

/** The change of a route in words: "demo-2 gone · spare took over · 41 positions replayed · pause 131 ms". */
export function changeInWords(events, nameOf, gap = null) {
  const parts = [];
  let replayed = 0;
  let pause = null;
  for (const event of list(events)) {
    if (event.kind === "fault") parts.push(`${nameOf(event.peer)} gone`);
    if (event.kind === "rerouted") {
      const opened = peersOfHops(event.opened);
      parts.push(opened.length ? `${opened.map(nameOf).join(", ")} took over` : "the servers were linked anew");
    }
    if (event.kind === "relayed") parts.push(`the gateway relays to ${nameOf(event.peer)}`);
    if (event.kind === "replayed") replayed += positionsOf(event);
    if (event.kind === "recovered" && isNumber(event.seconds)) pause = (pause ?? 0) + event.seconds * 1000;
  }
  if (replayed) parts.push(`${count(replayed, "position")} replayed`);
  const waited = pause ?? gap;
  if (isNumber(waited)) parts.push(`pause ${milliseconds(waited)}`);
  return [...new Set(parts)].join(" · ");
}

const SESSION = {
  queued: () => "queued",
  opened: (event, nameOf) => `opened ${chainInWords(event.hops, nameOf)}`,
  fault: (event, nameOf) => `${nameOf(event.peer)} gone${event.error ? `: ${inert(event.error, 80)}` : ""}`,
  rerouted: (event, nameOf) => {
    const opened = peersOfHops(event.opened);
    return opened.length ? `rerouted, ${opened.map(nameOf).join(", ")} took over` : "rerouted";
  },
  replayed: (event, nameOf) => `${count(positionsOf(event), "position")} replayed to ${nameOf(event.peer)}`,
  recovered: (event) => `recovered, pause ${milliseconds(isNumber(event.seconds) ? event.seconds * 1000 : null)}`,
  relayed: (event, nameOf) => `relayed to ${nameOf(event.peer)}`,
  ended: () => "ended",
};

/** A line of the log for an event of a session; null for those that are only numbers. */
export function sessionLine(event, nameOf) {
  const words = Object.hasOwn(SESSION, event.what) ? SESSION[event.what] : null;
  return words === null ? null : `${shortId(event.id)} ${words(event, nameOf)}`;
}

const PEER = {
  joined: "joined",
  left: "left",
  moved: "moved to",
  silent: "silent",
  back: "answers again",
};

/** A line of the log for an event of a peer. */
export function peerLine(event, nameOf) {
  const name = inert(event.name ?? "");
  const what = Object.hasOwn(PEER, event.what) ? PEER[event.what] : inert(event.what);
  return `${name.trim() ? name : nameOf(event.peer)} ${what} ${span(event.blocks)}`.trim();
}

/** The events whose lines are warnings. */
export function isTrouble(event) {
  return ["silent", "fault", "left"].includes(event.what);
}
