// The table of servers: state, blocks, rates and distance of each peer.

import { html } from "../dom.js";
import { kindOf, nameOfPeer, peersOf, stateOf } from "../data/swarm.js";
import { inert, isNumber, number, shortPeer, span } from "../data/text.js";
import { Panel } from "./parts.js";

const MOST_ROWS = 400;

function blocksOf(peer) {
  if (!Array.isArray(peer.blocks)) return "";
  return Array.isArray(peer.next_blocks) ? `${span(peer.blocks)} → ${span(peer.next_blocks)}` : span(peer.blocks);
}

function Row({ peer, since, several }) {
  const serves = Array.isArray(peer.blocks);
  const measured = serves && isNumber(peer.decode_ms_per_block) && peer.decode_ms_per_block > 0;
  const kind = kindOf(peer);
  const quantized = peer.quantize && peer.quantize !== "none" ? ` ${inert(peer.quantize, 12)}` : "";
  return html`<tr class=${kind}>
    <th scope="row" title=${inert(peer.peer, 128)}>
      <bdi>${nameOfPeer(peer)}</bdi> <span class="muted">${shortPeer(peer.peer)}</span>
    </th>
    ${several && html`<td><bdi>${inert(peer.model)}</bdi></td>`}
    <td class=${kind === "silent" ? "bad" : ""}>
      ${kind === "silent" ? html`<span aria-hidden="true">✖ </span>` : ""}
      ${serves || kind === "silent" ? stateOf(peer, since) : inert(peer.role)}
    </td>
    <td>${blocksOf(peer)}</td>
    <td>${serves ? `${inert(peer.dtype, 12)}${quantized}` : ""}</td>
    <td class="number">${measured ? number(peer.decode_ms_per_block, 2) : ""}</td>
    <td class="number">${measured ? number(peer.free_cache_tokens) : ""}</td>
    <td class="number">${measured ? number(peer.queue, 1) : ""}</td>
    <td class="number">${isNumber(peer.rtt_ms) ? number(peer.rtt_ms, 1) : "?"}</td>
  </tr>`;
}

export function Servers({ swarm, since }) {
  const peers = peersOf(swarm).sort(
    (one, other) =>
      String(one.model).localeCompare(String(other.model)) ||
      (one.blocks?.[0] ?? -1) - (other.blocks?.[0] ?? -1) ||
      String(one.peer).localeCompare(String(other.peer)),
  );
  const several = new Set(peers.filter((peer) => peer.blocks).map((peer) => peer.model)).size > 1;
  return html`<${Panel} id="servers" title="Servers">
    ${peers.length === 0
      ? html`<p class="muted">${swarm === null ? "Nothing is known of the swarm yet." : "No peer is known."}</p>`
      : html`<div class="scroll" tabindex="0" role="group" aria-label="table of servers">
          <table>
            <thead>
              <tr>
                <th scope="col">name</th>
                ${several && html`<th scope="col">model</th>`}
                <th scope="col">state</th>
                <th scope="col">blocks</th>
                <th scope="col">dtype</th>
                <th scope="col" class="number">ms/block</th>
                <th scope="col" class="number">cache</th>
                <th scope="col" class="number">queue</th>
                <th scope="col" class="number">rtt ms</th>
              </tr>
            </thead>
            <tbody>
              ${peers
                .slice(0, MOST_ROWS)
                .map((peer) => html`<${Row} key=${peer.peer} peer=${peer} since=${since} several=${several} />`)}
            </tbody>
          </table>
        </div>`}
    ${peers.length > MOST_ROWS && html`<p class="muted">and ${peers.length - MOST_ROWS} more</p>`}
  <//>`;
}
