// Requests to the gateway: its key, its errors, and what a person can do about each.

import { objectOf } from "./sse.js";
import { tab } from "./storage.js";
import { inert, seconds } from "./text.js";

const KEY = "raceme-key";
const TEXT = 400; // characters of an error's message

export function apiKey() {
  return tab.get(KEY) ?? "";
}

/** Keep a key for this tab; "" forgets it. */
export function setApiKey(key) {
  if (key) tab.set(KEY, key);
  else tab.remove(KEY);
}

/** The address of a path of the gateway, also where a proxy serves it below another path. */
export function address(path) {
  return new URL(path, document.baseURI).href;
}

/** An answer that is no success.  status: of HTTP; 0 where no answer came. */
export class GatewayError extends Error {
  constructor(message, { status = 0, code = "", retryAfter = null, requestId = "" } = {}) {
    super(inert(message, TEXT));
    this.name = "GatewayError";
    this.status = status;
    this.code = inert(code, 64);
    this.retryAfter = retryAfter;
    this.requestId = inert(requestId, 64);
  }
}

function retryAfterOf(text) {
  const wait = Number.parseFloat(text ?? "");
  return Number.isFinite(wait) ? Math.min(Math.max(wait, 0), 3600) : null;
}

const STATUS_OF = { no_chain: 503, overloaded: 503, shutting_down: 503, peer_fault: 502 };

/** The error of an object in OpenAI's form; within a stream its code stands for the status. */
export function errorOf(error, options = {}) {
  const known = error !== null && typeof error === "object" ? error : {};
  const code = [known.code, known.type].find((each) => typeof each === "string" && each) ?? "";
  const message = typeof known.message === "string" && known.message ? known.message : "the gateway gave no reason";
  return new GatewayError(message, { code, status: STATUS_OF[code] ?? 500, ...options });
}

async function refusal(response) {
  const text = await response.text().catch(() => "");
  return errorOf(objectOf(text)?.error, {
    status: response.status,
    retryAfter: retryAfterOf(response.headers.get("retry-after")),
    requestId: response.headers.get("x-request-id") ?? "",
  });
}

/** A response that succeeded.  Raises GatewayError; an AbortError passes. */
export async function call(path, { method = "GET", headers = {}, body, signal } = {}) {
  const key = apiKey();
  let response;
  try {
    response = await fetch(address(path), {
      method,
      headers: {
        ...(key ? { authorization: `Bearer ${key}` } : {}),
        ...(body === undefined ? {} : { "content-type": "application/json" }),
        ...headers,
      },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new GatewayError("the gateway does not answer");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** The JSON object at a path.  Raises GatewayError. */
export async function read(path, options = {}) {
  const response = await call(path, options);
  const value = objectOf(await response.text());
  if (value === null) throw new GatewayError(`${path} is no JSON object`, { status: response.status });
  return value;
}

function wait(error) {
  return error.retryAfter === null ? "in a moment" : `in ${seconds(Math.ceil(error.retryAfter))}`;
}

const BY_CODE = {
  context_length_exceeded: "Start a new chat, shorten the message, or ask for fewer tokens in the settings.",
  model_not_found: "Choose another model in the settings.",
  shutting_down: "The gateway ends. Try again when it is back.",
};

const BY_STATUS = {
  0: () => "Is the gateway running? The page goes on trying to reach it.",
  400: () => "Change the message or the settings.",
  401: () => "Enter a key of this gateway.",
  403: () => "This gateway serves other addresses. Start it with --allowed-host and the name in the address bar.",
  404: () => "This gateway does not offer it. Is it of this version?",
  408: () => "The message came too slowly. Try again.",
  413: () => "The conversation is too large. Start a new chat.",
  429: (error) => `The gateway is busy. Try again ${wait(error)}.`,
  431: () => "The request has too many headers. Is a proxy in between?",
  502: () => "A server of the swarm failed. Try again: another one takes its place, if there is one.",
  503: (error) =>
    error.code === "no_chain"
      ? `Blocks of the model have no server. Start a node for them (the block map has the command), then try again.`
      : `The servers are full. Try again ${wait(error)}.`,
  504: () => "No answer in time. Try again.",
};

/** One sentence: what a person can do about an error. */
export function advice(error) {
  const byCode = BY_CODE[error.code];
  if (byCode) return byCode;
  const byStatus = BY_STATUS[error.status];
  if (byStatus) return byStatus(error);
  const id = error.requestId ? ` The gateway's log has it under ${error.requestId}.` : "";
  return `Try again.${id}`;
}

/** Whether the same request may succeed later. */
export function mayRetry(error) {
  return error.status === 0 || error.status === 408 || error.status === 429 || error.status >= 500;
}
