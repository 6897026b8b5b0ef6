// The block map: a row for each server over the blocks of the model, the coverage, and the holes with their command.

import { html } from "../dom.js";
import { fillCommand, holesOf, kindOf, nameOfPeer, runsOf, serversOf, silentSeconds, stateOf } from "../data/swarm.js";
import { beginning, count, inert, isNumber, number, span } from "../data/text.js";
import { Command, Panel, Said } from "./parts.js";

const MOST_ROWS = 400;
const MOST_HOLES = 6;
const ROWS_IN_SIGHT = 12; // more are scrolled, which a keyboard can do where the list takes the focus
const TICKS = 8; // at most as many numbers along the axis

function at(start, stop, blocks) {
  return { left: `${(100 * start) / blocks}%`, width: `${(100 * (stop - start)) / blocks}%` };
}

function tickStep(blocks) {
  return [1, 2, 5, 10, 20, 50, 100, 200, 500].find((step) => blocks / step <= TICKS) ?? 1000;
}

function Axis({ blocks }) {
  const step = tickStep(blocks);
  const ticks = Array.from({ length: Math.floor((blocks - 1) / step) + 1 }, (_, index) => index * step);
  return html`<div class="row axis" aria-hidden="true">
    <span class="row-name">block</span>
    <div class="track bare">
      ${ticks.map((tick) => html`<span class="tick" style=${{ left: `${(100 * tick) / blocks}%` }}>${tick}</span>`)}
    </div>
  </div>`;
}

function coverageInWords(runs) {
  return runs
    .map(({ start, stop, count: held }) => `blocks ${span([start, stop])}: ${held ? count(held, "server") : "nobody"}`)
    .join(", ");
}

function Coverage({ model }) {
  const runs = runsOf(model.coverage);
  return html`<div class="row">
    <span class="row-name">coverage</span>
    <div class="track" aria-hidden="true">
      ${runs.map(
        ({ start, stop, count: held }) =>
          html`<span class="run held-${Math.min(held, 2)}" style=${at(start, stop, model.blocks)}>
            ${held === 0 ? "✖" : held}
          </span>`,
      )}
    </div>
    <${Said}>${coverageInWords(runs)}<//>
  </div>`;
}

function Server({ peer, blocks, since }) {
  const [start, stop] = peer.blocks;
  const kind = kindOf(peer);
  const silent = silentSeconds(peer, since) !== null;
  const rate = isNumber(peer.decode_ms_per_block) && peer.decode_ms_per_block > 0
    ? `${number(peer.decode_ms_per_block, 1)} ms`
    : "";
  return html`<li class="row ${kind}">
    <span class="row-name"><bdi>${nameOfPeer(peer)}</bdi></span>
    <div class="track" aria-hidden="true">
      <span class="bar ${kind}" style=${at(start, stop, blocks)}></span>
      ${Array.isArray(peer.next_blocks) &&
      html`<span class="bar next" style=${at(...peer.next_blocks, blocks)}></span>`}
    </div>
    <span class="row-note">
      <${Said}>blocks ${span(peer.blocks)}, <//>
      ${silent ? html`<span aria-hidden="true">✖ </span>${stateOf(peer, since)}` : kind === "online" ? rate : stateOf(peer, since)}
      ${silent || kind !== "online" || rate === "" ? "" : html`<${Said}> a block<//>`}
    </span>
  </li>`;
}

function Hole({ swarm, model, hole }) {
  const where = hole === null ? "" : span(hole);
  return html`<div class="hole">
    <p>${hole === null
      ? html`<strong>No server has this model.</strong> Start the first one:`
      : html`<strong>Blocks ${where} have no server</strong>, so no text can be made. Start a node for them:`}</p>
    <${Command} text=${fillCommand(swarm, model, hole)} />
  </div>`;
}

export function BlockMap({ swarm, model, since }) {
  if (swarm === null) {
    return html`<${Panel} id="blocks" title="Blocks"><p class="muted">Nothing is known of the swarm yet.</p><//>`;
  }
  if (model === null) {
    return html`<${Panel} id="blocks" title="Blocks">
      <p>The swarm ${beginning(swarm.swarm)} has no server of ${inert(swarm.model ?? "the model", 64)}.</p>
      <${Hole} swarm=${swarm} model=${null} hole=${null} />
    <//>`;
  }
  const servers = serversOf(swarm, model);
  const holes = holesOf(model);
  return html`<${Panel} id="blocks" title="Blocks">
    <div class="map">
      <${Axis} blocks=${model.blocks} />
      <${Coverage} model=${model} />
      <ul class="rows" aria-label="servers and their blocks" tabindex=${servers.length > ROWS_IN_SIGHT ? 0 : undefined}>
        ${servers
          .slice(0, MOST_ROWS)
          .map((peer) => html`<${Server} key=${peer.peer} peer=${peer} blocks=${model.blocks} since=${since} />`)}
      </ul>
      ${servers.length > MOST_ROWS && html`<p class="muted">and ${servers.length - MOST_ROWS} more</p>`}
    </div>
    <div aria-live="polite">
      ${holes
        .slice(0, MOST_HOLES)
        .map((hole) => html`<${Hole} key=${span(hole)} swarm=${swarm} model=${model} hole=${hole} />`)}
      ${holes.length > MOST_HOLES && html`<p>and ${count(holes.length - MOST_HOLES, "hole")} more</p>`}
    </div>
  <//>`;
}
