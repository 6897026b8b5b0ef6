// Texts for people: names of strangers made inert, numbers, times.

export const NAME_CHARACTERS = 32;
const MARKS = 2; // combining marks on one character; a pile of them would cover the neighbours
// Control, format (bidi among them), surrogate, private, unassigned, line ends, and what draws nothing.
const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}]/u;
const MARK = /\p{M}/u;

/** A stranger's text as it may be shown: at most `most` characters, characters that cannot be seen as \u{...}. */
export function inert(value, most = NAME_CHARACTERS) {
  const pieces = [];
  let length = 0;
  let marks = 0;
  for (const character of String(value ?? "")) {
    marks = MARK.test(character) ? marks + 1 : 0;
    const hidden = UNSEEN.test(character) || marks > MARKS;
    const piece = hidden ? `\\u{${character.codePointAt(0).toString(16)}}` : character;
    const size = hidden ? piece.length : 1;
    if (length + size > most) {
      while (length > most - 1) length -= pieces.pop().size;
      return `${pieces.map((each) => each.piece).join("")}…`;
    }
    pieces.push({ piece, size });
    length += size;
  }
  return pieces.map((each) => each.piece).join("");
}

/** The end of a peer id, which differs between peers; the beginning does not. */
export function shortPeer(peer) {
  return `…${inert(String(peer).slice(-6), 8)}`;
}

/** The beginning of a long id: of a swarm, of a revision. */
export function beginning(id, characters = 8) {
  return inert(String(id ?? "").slice(0, characters), 2 * characters);
}

/** The beginning of a request's id, without its prefix. */
export function shortId(id) {
  return inert(String(id).replace(/^[a-z]+[-_]/i, "").slice(0, 6), 8);
}

export function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

/** A number with `digits` after the point; "?" where none is known. */
export function number(value, digits = 0) {
  return isNumber(value) ? value.toFixed(digits) : "?";
}

export function milliseconds(value) {
  if (!isNumber(value)) return "?";
  return value >= 10_000 ? `${(value / 1000).toFixed(1)} s` : `${value.toFixed(value < 10 ? 1 : 0)} ms`;
}

export function seconds(value) {
  if (!isNumber(value)) return "?";
  return value < 90 ? `${Math.max(0, Math.round(value))} s` : `${Math.round(value / 60)} min`;
}

/** The time of day of Unix seconds. */
export function clock(at) {
  if (!isNumber(at)) return "";
  return new Date(at * 1000).toLocaleTimeString([], { hour12: false });
}

/** Blocks [start, stop) as "start:stop"; "" where a peer serves none. */
export function span(blocks) {
  return Array.isArray(blocks) && blocks.length === 2 ? `${number(blocks[0])}:${number(blocks[1])}` : "";
}

export function spans(list) {
  return list.map(span).join(", ");
}

export function count(amount, one, many = `${one}s`) {
  return `${amount} ${amount === 1 ? one : many}`;
}
