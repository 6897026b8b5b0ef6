// A conversation: its turns, the answer that comes, and what a person does to it (send, stop, try again, begin anew).

import { bodyOf, complete } from "./completion.js";
import { stepMilliseconds } from "./trace.js";

const WINDOW = 64; // latest steps whose median is the usual step time
const GRADES = [1.5, 2.5, 5]; // times the usual step time at which the colour changes

export function median(values) {
  if (!values.length) return null;
  const sorted = [...values].sort((one, other) => one - other);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** 0 for a usual step time, up to 3 for a slow one; the usual one is the median of the steps before. */
export function gradeOf(step, before) {
  const usual = median(before.slice(-WINDOW));
  if (step === null || usual === null || usual <= 0) return 0;
  return GRADES.filter((times) => step >= usual * times).length;
}

let made = 0; // turns ever made: the key of the next one

function newAnswer() {
  return {
    id: ++made,
    role: "assistant",
    text: "",
    tokens: [],
    state: "waiting", // then "streaming", then "done", "stopped" or "failed"
    requestId: "",
    chunkId: "",
    firstMs: null,
    perSecond: null,
    count: 0,
    error: null,
    reason: null,
  };
}

/** Adds a token to an answer.  now, began: performance.now(); steps: the step times so far, in ms. */
export function addToken(answer, part, now, began, steps) {
  const previous = answer.tokens.at(-1);
  const gap = previous === undefined ? null : now - previous.at;
  // The time of the first token is that of the whole prompt, and no measure for the others.
  const step = previous === undefined ? null : stepMilliseconds(part.hops) ?? gap;
  const slowest = part.events.length && gap !== null ? Math.max(step ?? 0, gap) : step;
  answer.tokens.push({
    text: part.text,
    thinks: part.thinks,
    hops: part.hops,
    events: part.events,
    at: now,
    gap,
    step,
    grade: gradeOf(slowest, steps),
  });
  if (step !== null && !part.events.length) steps.push(step);
  if (!part.thinks) answer.text += part.text;
  answer.chunkId = part.id ?? answer.chunkId;
  answer.state = "streaming";
  answer.count += 1;
  answer.firstMs ??= now - began;
  const first = answer.tokens[0].at;
  answer.perSecond = now > first ? (answer.tokens.length - 1) / ((now - first) / 1000) : null;
}

export class Conversation {
  turns = [];
  version = 0; // grows with every change
  #listeners = new Set();
  #stop = null;

  get busy() {
    return this.#stop !== null;
  }

  /** The answer that comes, or the latest one. */
  get answer() {
    const last = this.turns.at(-1);
    return last?.role === "assistant" ? last : null;
  }

  listen(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  send(text, settings) {
    if (this.busy || !text.trim()) return;
    this.turns.push({ id: ++made, role: "user", text });
    void this.#answer(settings);
  }

  /** Ask again for the answer that failed. */
  retry(settings) {
    if (this.busy || !this.turns.length) return;
    if (this.answer !== null) this.turns.pop();
    void this.#answer(settings);
  }

  stop() {
    this.#stop?.abort();
  }

  clear() {
    this.stop();
    this.turns = [];
    this.#changed();
  }

  #changed() {
    this.version += 1;
    for (const listener of this.#listeners) listener();
  }

  async #answer(settings) {
    const answer = newAnswer();
    const body = bodyOf(this.turns, settings);
    this.turns.push(answer);
    const stop = new AbortController();
    this.#stop = stop;
    this.#changed();
    const began = performance.now();
    const steps = [];
    try {
      for await (const part of complete(body, stop.signal)) {
        if (part.kind === "begun") answer.requestId = part.requestId;
        else if (part.kind === "token") addToken(answer, part, performance.now(), began, steps);
        else {
          answer.reason = part.reason;
          answer.count = part.usage?.completion_tokens ?? answer.count;
        }
        this.#changed();
      }
      answer.state = "done";
    } catch (error) {
      answer.state = stop.signal.aborted ? "stopped" : "failed";
      if (!stop.signal.aborted) answer.error = error;
    } finally {
      if (this.#stop === stop) this.#stop = null;
      this.#changed();
    }
  }
}

const WHO = { user: "You", assistant: "Answer" };

/** The whole conversation as plain text. */
export function asText(turns, system) {
  const said = turns.filter((turn) => turn.text !== "").map((turn) => `${WHO[turn.role]}:\n${turn.text.trim()}`);
  return [...(system.trim() ? [`System:\n${system.trim()}`] : []), ...said].join("\n\n");
}
