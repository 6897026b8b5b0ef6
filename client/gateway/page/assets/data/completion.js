// One request to /v1/chat/completions, streamed: the settings, the body, the tokens.

import { apiKey, address, call, errorOf, GatewayError } from "./api.js";
import { objectOf, serverEvents } from "./sse.js";
import { isNumber } from "./text.js";
import { tab } from "./storage.js";

const SETTINGS = "raceme-settings";

export const USUAL = { model: "", temperature: 0.7, top_p: 1, max_tokens: 512, seed: null, system: "" };

/** The fields of the settings that are numbers: their bounds are those of the API. */
export const NUMBERS = {
  temperature: { label: "Temperature", min: 0, max: 2, step: 0.05, whole: false },
  top_p: { label: "Top p", min: 0.01, max: 1, step: 0.01, whole: false },
  max_tokens: { label: "Most tokens", min: 1, max: 1_000_000, step: 1, whole: true },
  seed: { label: "Seed", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1, whole: true, empty: true },
};

/** The number in a field, null where the field may be empty and is; undefined for anything else. */
export function numberIn(name, text) {
  const { min, max, whole, empty } = NUMBERS[name];
  const trimmed = String(text).trim();
  if (trimmed === "") return empty ? null : undefined;
  const value = Number(trimmed);
  if (!Number.isFinite(value) || value < min || value > max) return undefined;
  return whole && !Number.isSafeInteger(value) ? undefined : value;
}

export function loadSettings() {
  const kept = objectOf(tab.get(SETTINGS) ?? "") ?? {};
  const settings = { ...USUAL };
  for (const name of ["model", "system"]) if (typeof kept[name] === "string") settings[name] = kept[name];
  for (const name of Object.keys(NUMBERS)) {
    const value = kept[name] === undefined ? undefined : numberIn(name, kept[name] ?? "");
    if (value !== undefined) settings[name] = value;
  }
  return settings;
}

export function keepSettings(settings) {
  tab.set(SETTINGS, JSON.stringify(settings));
}

/** The messages of a conversation as the API takes them; questions without an answer are left out, but the last. */
export function messagesOf(turns, system) {
  const unanswered = (turn) => turn?.role === "assistant" && turn.text === "";
  const messages = turns
    .filter((turn, index) => !unanswered(turn) && !(turn.role === "user" && unanswered(turns[index + 1])))
    .map((turn) => ({ role: turn.role, content: turn.text }));
  return system.trim() ? [{ role: "system", content: system }, ...messages] : messages;
}

export function bodyOf(turns, settings) {
  return {
    model: settings.model,
    messages: messagesOf(turns, settings.system),
    temperature: settings.temperature,
    top_p: settings.top_p,
    max_completion_tokens: settings.max_tokens,
    ...(settings.seed === null ? {} : { seed: settings.seed }),
    stream: true,
    stream_options: { include_usage: true },
    raceme: { trace: true },
  };
}

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/** The same request for a shell.  The key stays out of it: the shell has it in RACEME_API_KEY. */
export function curlOf(turns, settings) {
  const { stream_options: _, raceme: __, ...body } = bodyOf(turns, settings);
  const key = apiKey() ? ` \\\n  -H "Authorization: Bearer $RACEME_API_KEY"` : "";
  return (
    `curl -N ${quoted(address("v1/chat/completions"))} \\\n  -H 'Content-Type: application/json'${key} \\\n` +
    `  -d ${quoted(JSON.stringify(body))}`
  );
}

/**
 * The parts of an answer as they come:
 *   {kind: "begun", requestId}; {kind: "token", text, thinks (thoughts are no part of the answer), hops, events, id}; {kind: "ended", reason, usage}.
 * Raises GatewayError; an AbortError passes.
 */
export async function* complete(body, signal) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { accept: "text/event-stream" },
    body,
    signal,
  });
  const requestId = response.headers.get("x-request-id") ?? "";
  yield { kind: "begun", requestId };
  let reason = null;
  let usage = null;
  try {
    for await (const { data } of serverEvents(response)) {
      if (data === "[DONE]") {
        yield { kind: "ended", reason, usage };
        return;
      }
      const chunk = objectOf(data);
      if (chunk === null) continue;
      if (chunk.error) throw errorOf(chunk.error, { requestId });
      const choice = chunk.choices?.[0];
      reason = choice?.finish_reason ?? reason;
      if (chunk.usage && isNumber(chunk.usage.completion_tokens)) usage = chunk.usage;
      const content = choice?.delta?.content;
      const thought = choice?.delta?.reasoning_content;
      const thinks = typeof thought === "string" && thought !== "";
      const text = thinks ? thought : typeof content === "string" ? content : "";
      const hops = Array.isArray(chunk.raceme?.hops) ? chunk.raceme.hops : [];
      const events = Array.isArray(chunk.raceme?.events) ? chunk.raceme.events : [];
      if (text || hops.length || events.length) yield { kind: "token", text, thinks, hops, events, id: chunk.id };
    }
  } catch (error) {
    if (error instanceof GatewayError || error.name === "AbortError") throw error;
    throw new GatewayError("the connection broke before the answer was whole", { requestId });
  }
  throw new GatewayError("the connection ended before the answer was whole", { requestId });
}
