// Server-sent events over fetch.  EventSource can neither send a key nor be told why it failed.

/** Turns any split of a stream back into events, after the WHATWG's "event stream interpretation". */
export class EventParser {
  #rest = "";
  #started = false;
  #event = "";
  #data = [];
  #id = null;

  /** Add text; the events that are complete now, as {event, data, id}; `id` is null where none was sent. */
  feed(text) {
    let buffer = this.#rest + text;
    if (!this.#started && buffer.length > 0) {
      this.#started = true;
      if (buffer.startsWith("\uFEFF")) buffer = buffer.slice(1);
    }
    const found = [];
    let begin = 0;
    for (;;) {
      const end = this.#lineEnd(buffer, begin);
      if (end === null) break;
      const event = this.#take(buffer.slice(begin, end.stop));
      if (event !== null) found.push(event);
      begin = end.next;
    }
    this.#rest = buffer.slice(begin);
    return found;
  }

  #lineEnd(buffer, begin) {
    for (let index = begin; index < buffer.length; index += 1) {
      const character = buffer[index];
      if (character === "\n") return { stop: index, next: index + 1 };
      if (character !== "\r") continue;
      if (index + 1 === buffer.length) return null; // an LF may follow
      return { stop: index, next: buffer[index + 1] === "\n" ? index + 2 : index + 1 };
    }
    return null;
  }

  #take(line) {
    if (line === "") {
      const event = { event: this.#event || "message", data: this.#data.join("\n"), id: this.#id };
      const whole = this.#data.length > 0;
      this.#event = "";
      this.#data = [];
      return whole ? event : null;
    }
    if (line.startsWith(":")) return null; // a comment: keep-alive
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    let value = colon < 0 ? "" : line.slice(colon + 1);
    if (value.startsWith(" ")) value = value.slice(1);
    if (field === "event") this.#event = value;
    else if (field === "data") this.#data.push(value);
    else if (field === "id" && !value.includes("\0")) this.#id = value;
    return null;
  }
}

/** The events of a response; `onBytes` is called for everything that arrives, comments among it. */
export async function* serverEvents(response, onBytes = () => {}) {
  const parser = new EventParser();
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      onBytes();
      yield* parser.feed(decoder.decode(value, { stream: true }));
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** A JSON object, or null for anything else. */
export function objectOf(text) {
  try {
    const value = JSON.parse(text);
    return value !== null && typeof value === "object" && !Array.isArray(value) ? value : null;
  } catch {
    return null;
  }
}
