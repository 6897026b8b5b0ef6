// What a description of a swarm (/api/swarm) says about one model: rows, coverage, holes, the command to fill them.

import { inert, isNumber, number, shortPeer, span } from "./text.js";

const MODEL_CHARACTERS = 64;
const PEER_ID = /^[1-9A-HJ-NP-Za-km-z]{20,128}$/; // base58
const ADDRESS = /^\/(ip4|ip6|dns|dns4|dns6)\/[A-Za-z0-9.:_-]{1,253}\/tcp\/\d{1,5}$/;
const PLAIN_WORD = /^[A-Za-z0-9_@%+=:,./-]+$/;
const MODEL_NAME = /^[\p{L}\p{N}_@%+=:,./ -]{1,200}$/u;

const list = (value) => (Array.isArray(value) ? value : []);

export function peersOf(swarm) {
  return list(swarm?.peers).filter((peer) => peer !== null && typeof peer === "object");
}

/** The name of a peer as a person may read it; the end of its id where it has none. */
export function nameOfPeer(peer, id) {
  const name = inert(peer?.name ?? "");
  return name.trim() ? name : shortPeer(peer?.peer ?? id);
}

/** A function from a peer id to a name; names that several peers have carry the end of the id. */
export function namesOf(swarm) {
  const names = new Map();
  const often = new Map();
  for (const peer of peersOf(swarm)) {
    const name = nameOfPeer(peer);
    names.set(peer.peer, name);
    often.set(name, (often.get(name) ?? 0) + 1);
  }
  return (id) => {
    const name = names.get(id);
    if (name === undefined) return shortPeer(id);
    return often.get(name) > 1 && !name.startsWith("…") ? `${name} ${shortPeer(id)}` : name;
  };
}

/** The gateway's own model among those of the swarm; null where no peer serves it. */
export function modelOf(swarm) {
  const models = list(swarm?.models).filter((model) => model !== null && typeof model === "object");
  return (
    models.find((model) => model.revision === swarm.revision) ??
    models.find((model) => model.model === swarm.model) ??
    (swarm?.model ? null : models[0] ?? null)
  );
}

/** The servers of a model: by their first block, then by name; those of another revision are left out. */
export function serversOf(swarm, model) {
  return peersOf(swarm)
    .filter((peer) => Array.isArray(peer.blocks) && peer.model === model.model)
    .filter((peer) => !peer.revision || !model.revision || peer.revision === model.revision)
    .sort(
      (one, other) =>
        one.blocks[0] - other.blocks[0] ||
        one.blocks[1] - other.blocks[1] ||
        String(one.name).localeCompare(String(other.name)) ||
        String(one.peer).localeCompare(String(other.peer)),
    );
}

/** Runs of equal counts: [{start, stop, count}]. */
export function runsOf(coverage) {
  const runs = [];
  list(coverage).forEach((count, block) => {
    const last = runs.at(-1);
    if (last !== undefined && last.count === count) last.stop = block + 1;
    else runs.push({ start: block, stop: block + 1, count });
  });
  return runs;
}

/** Blocks as runs: [1, 2, 3, 7] -> [[1, 4], [7, 8]]. */
export function runsOfBlocks(blocks) {
  const runs = [];
  for (const block of [...list(blocks)].sort((one, other) => one - other)) {
    const last = runs.at(-1);
    if (last !== undefined && last[1] === block) last[1] = block + 1;
    else runs.push([block, block + 1]);
  }
  return runs;
}

/** The holes of a swarm: of its model, or everything where nobody serves the model ("blocks" unknown: null). */
export function holesOf(model) {
  return list(model?.holes).filter((hole) => Array.isArray(hole) && hole.length === 2);
}

/** The part of a model that the fewest tokens a second pass: "10:20", "every block alike", or "". */
export function weakestOf(model) {
  const narrow = list(model?.bottleneck_blocks);
  if (!narrow.length) return "";
  if (narrow.length === model.blocks) return "every block alike";
  return runsOfBlocks(narrow).map(span).join(", ");
}

/** How long a peer has been silent now, in seconds; null where it is not. */
export function silentSeconds(peer, since) {
  if (peer.answers !== "silent" && peer.state !== "unreachable") return null;
  return isNumber(peer.silent_s) ? peer.silent_s + Math.max(0, since) : 0;
}

/** The state of a peer in words. */
export function stateOf(peer, since) {
  const silent = silentSeconds(peer, since);
  if (silent !== null) return `silent ${number(Math.round(silent))} s`;
  if (Array.isArray(peer.next_blocks)) return `${inert(peer.state)}, moving`;
  return inert(peer.state);
}

/** One word of the kinds that have a look of their own. */
export function kindOf(peer) {
  if (peer.answers === "silent" || peer.state === "unreachable") return "silent";
  return ["online", "joining", "draining"].includes(peer.state) ? peer.state : "other";
}

/** A word for a POSIX shell; null for a word with characters that cannot be seen. */
export function shellWord(text) {
  if (PLAIN_WORD.test(text)) return text;
  return MODEL_NAME.test(text) ? `'${text}'` : null;
}

/** Addresses with peer ids, of peers that answer; strangers' addresses only in a plain form. */
function addressesOf(swarm, most) {
  const answers = { yes: 0, unknown: 1 };
  const found = peersOf(swarm)
    .filter((peer) => kindOf(peer) !== "silent" && PEER_ID.test(peer.peer))
    .sort((one, other) => (answers[one.answers] ?? 1) - (answers[other.answers] ?? 1))
    .flatMap((peer) => {
      const address = list(peer.addresses).find((each) => ADDRESS.test(each));
      return address === undefined ? [] : [`${address}/p2p/${peer.peer}`];
    });
  return [...new Set(found)].slice(0, most);
}

/**
 * The command that starts a node for `hole` ([start, stop), or null: as many blocks as fit).
 *
 * It is for a person to paste into a shell: nothing from a stranger stands in it unless it is a plain word.
 */
export function fillCommand(swarm, model, hole) {
  const words = ["python", "-m", "node"];
  const name = shellWord(String(model?.model ?? swarm?.model ?? ""));
  if (name !== null && name !== "") words.push(name);
  if (hole !== null && hole.every(Number.isInteger)) words.push("--blocks", span(hole));
  const peers = addressesOf(swarm, 2);
  words.push("--peers", ...(peers.length ? peers : ["ADDRESS_OF_A_NODE"]));
  if (swarm?.swarm && swarm.swarm !== "public") words.push("--swarm-key", "swarm.key");
  return words.join(" ");
}

/** One line about a model for titles and headers: "complete", or what is missing. */
export function completeness(swarm, model) {
  if (swarm === null) return "not known yet";
  if (model === null) return "no servers";
  const holes = holesOf(model);
  return holes.length ? `blocks ${holes.map(span).join(", ")} missing` : "complete";
}

export function modelName(model) {
  return inert(model?.model ?? "", MODEL_CHARACTERS);
}
