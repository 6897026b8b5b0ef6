// The gateway's events, for as long as the page is open: read, resumed after a loss, read again.

import { call, GatewayError } from "./api.js";
import { objectOf, serverEvents } from "./sse.js";

const SILENCE_MS = 25_000; // the gateway says something every 10 s
const FIRST_PAUSE_MS = 1000;
const MOST_PAUSE_MS = 10_000;

/** The pause before attempt number `attempt` (from 0), in ms; `retryAfter`: seconds that the gateway named. */
export function pauseBefore(attempt, retryAfter = null) {
  const usual = Math.min(FIRST_PAUSE_MS * 2 ** Math.min(attempt, 10), MOST_PAUSE_MS);
  return retryAfter === null ? usual : Math.min(Math.max(retryAfter * 1000, FIRST_PAUSE_MS), 60_000);
}

/**
 * Reads /api/events until the page closes.
 *
 * onEvent(name, data, id): each event.  onLink({state, error, retryAt}): "connecting", "live", "lost" with the time
 * (performance.now()) of the next attempt, or "key": the gateway asks for a key, and `retryNow` goes on.
 */
export class Feed {
  #onEvent;
  #onLink;
  #lastId = "0"; // the gateway's whole memory of events: the page begins with a past
  #wake = () => {};
  #attempt = 0;
  #began = false;

  constructor({ onEvent, onLink }) {
    this.#onEvent = onEvent;
    this.#onLink = onLink;
  }

  start() {
    if (this.#began) return;
    this.#began = true;
    void this.#run();
    addEventListener("online", () => this.retryNow());
    document.addEventListener("visibilitychange", () => {
      if (document.visibilityState === "visible") this.retryNow();
    });
  }

  /** Do not wait for the next attempt. */
  retryNow() {
    this.#wake();
  }

  async #run() {
    this.#onLink({ state: "connecting" });
    for (;;) {
      const error = await this.#read();
      const pause = error.status === 401 ? null : pauseBefore(this.#attempt, error.retryAfter);
      this.#attempt += 1;
      this.#onLink({
        state: pause === null ? "key" : "lost",
        error,
        retryAt: pause === null ? null : performance.now() + pause,
      });
      await this.#pause(pause);
    }
  }

  /** Read until the stream ends; why it did. */
  async #read() {
    const stop = new AbortController();
    let timer = 0;
    const heard = () => {
      clearTimeout(timer);
      timer = setTimeout(() => stop.abort(), SILENCE_MS);
    };
    heard();
    try {
      const response = await call("api/events", {
        headers: { accept: "text/event-stream", "last-event-id": this.#lastId },
        signal: stop.signal,
      });
      this.#attempt = 0;
      this.#onLink({ state: "live" });
      for await (const { event, data, id } of serverEvents(response, heard)) {
        if (id !== null) this.#lastId = id;
        const value = objectOf(data);
        if (value !== null) this.#pass(event, value, id);
      }
      return new GatewayError("the gateway ended the connection");
    } catch (error) {
      if (error instanceof GatewayError) return error;
      return new GatewayError(stop.signal.aborted ? "the gateway is silent" : "the connection broke");
    } finally {
      clearTimeout(timer);
      stop.abort();
    }
  }

  /** A mistake of ours in one event is reported, and does not end the stream. */
  #pass(event, value, id) {
    try {
      this.#onEvent(event, value, id);
    } catch (error) {
      reportError(error);
    }
  }

  async #pause(milliseconds) {
    let timer = 0;
    await new Promise((resolve) => {
      this.#wake = resolve;
      if (milliseconds !== null) timer = setTimeout(resolve, milliseconds);
    });
    clearTimeout(timer);
    this.#wake = () => {};
  }
}
